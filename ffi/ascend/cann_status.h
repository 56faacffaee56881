// Owns the meaning of aclnn status codes: their names, whose fault they are, what a user can do.
#ifndef JAX_KVCACHE_FFI_CANN_STATUS_H_
#define JAX_KVCACHE_FFI_CANN_STATUS_H_

#include "cann.h"

namespace jax_kvcache::cann {

// "ACLNN_ERR_PARAM_INVALID", or "unknown status".
const char* StatusName(Status status);

// One sentence, or an empty string where there is nothing to say.
const char* StatusAdvice(Status status);

// True for 16xxxx: CANN refuses the arguments; anything else went wrong inside CANN.
bool IsCallersFault(Status status);

}  // namespace jax_kvcache::cann

#endif  // JAX_KVCACHE_FFI_CANN_STATUS_H_
