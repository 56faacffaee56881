// Owns how the stand-in runs FFI handlers: it gives them a device's view of the call.
#ifndef JAX_KVCACHE_FFI_STANDIN_TRAMPOLINE_H_
#define JAX_KVCACHE_FFI_STANDIN_TRAMPOLINE_H_

#include "xla/ffi/api/c_api.h"

namespace standin {

// Returns a handler that calls `handler` with device addresses, a stream, scratch memory and no
// thread pool, and then waits for the stream, because XLA's CPU plugin has no streams. The same
// handler always gets the same wrapper, because XLA accepts a second registration only if it equals
// the first. Returns null if there are too many handlers.
XLA_FFI_Handler* Wrap(XLA_FFI_Handler* handler);

// Makes handlers see a runtime with the FFI of this file's headers, not with the CPU plugin's 0.2.
// Called before the first handler is registered.
void UseNewestFfi();

}  // namespace standin

#endif  // JAX_KVCACHE_FFI_STANDIN_TRAMPOLINE_H_
