// Owns the meaning of aclnn status codes: their names, who is at fault, what a user can do.
#ifndef JAX_KVCACHE_FFI_ASCEND_CANN_STATUS_H_
#define JAX_KVCACHE_FFI_ASCEND_CANN_STATUS_H_

#include "ascend/cann.h"

namespace jax_kvcache::cann {

// "ACLNN_ERR_PARAM_INVALID", or "unknown status".
const char* StatusName(Status status);

// One sentence, or an empty string where there is nothing to say.
const char* StatusAdvice(Status status);

// True for codes 16xxxx, with which CANN refuses the arguments. Others are failures inside CANN.
bool IsCallersFault(Status status);

}  // namespace jax_kvcache::cann

#endif  // JAX_KVCACHE_FFI_ASCEND_CANN_STATUS_H_
