// Owns what the library says about itself.
#include "kernel.h"
#include "plan.h"
#include "xla_call.h"

// XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR of the headers it was built with: a runtime with an
// older FFI must not be given its handlers.
JAX_KVCACHE_EXPORT int jax_kvcache_ffi_api_version() {
  return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR;
}

// The variant of the kernel in use, "baseline", "avx2", "avx512" or "avx512_bf16".
JAX_KVCACHE_EXPORT const char* jax_kvcache_simd() {
  return jax_kvcache::SimdName(jax_kvcache::ActiveSimd());
}

// Makes later calls use the named variant; false if this machine has no such one. For tests.
JAX_KVCACHE_EXPORT bool jax_kvcache_use_simd(const char* name) {
  return jax_kvcache::UseSimd(name);
}

// How many threads a call that moves `bytes` runs on, at most `max_threads`.
JAX_KVCACHE_EXPORT int64_t jax_kvcache_threads(int64_t bytes, int64_t max_threads) {
  return jax_kvcache::WorthThreads(bytes, max_threads);
}
