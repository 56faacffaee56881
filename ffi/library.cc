// Owns what the library says about itself.
#include "xla_call.h"

// XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR of the headers it was built with: a runtime with an
// older FFI must not be given its handlers.
JAX_KVCACHE_EXPORT int jax_kvcache_ffi_api_version() {
  return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR;
}
