// Owns how FFI handlers run in the stand-in: between the runtime and the handler, as on a device.
#ifndef JAX_KVCACHE_STANDIN_TRAMPOLINE_H_
#define JAX_KVCACHE_STANDIN_TRAMPOLINE_H_

#include "xla/ffi/api/c_api.h"

namespace standin {

// A handler that runs `handler` with tagged buffers, a stream, scratch memory and no thread pool,
// then waits for its stream, since the runtime below has none.  The same handler always gets the
// same trampoline: XLA takes a second registration only if it equals the first.  Null when there
// are too many.
XLA_FFI_Handler* Wrap(XLA_FFI_Handler* handler);

}  // namespace standin

#endif  // JAX_KVCACHE_STANDIN_TRAMPOLINE_H_
