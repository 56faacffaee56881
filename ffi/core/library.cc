// Owns what the library tells Python about itself.
#include "core/xla_call.h"
#include "cpu/simd_level.h"
#include "cpu/threads.h"

// The version of the FFI headers that the library was built with, 1000 * major + minor: a runtime
// with an older FFI must not be given its handlers.
JAX_KVCACHE_EXPORT int jax_kvcache_ffi_api_version() {
  return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR;
}

// The instruction set in use: "baseline", "avx2", "avx512" or "avx512_bf16".
JAX_KVCACHE_EXPORT const char* jax_kvcache_simd() {
  return jax_kvcache::SimdName(jax_kvcache::ActiveSimd());
}

// For tests: makes later calls use the named instruction set. Returns false, and changes nothing,
// if this machine does not have it.
JAX_KVCACHE_EXPORT bool jax_kvcache_use_simd(const char* name) {
  return jax_kvcache::UseSimd(name);
}

// How many threads a call that moves `bytes` bytes runs on, at most `max_threads`.
JAX_KVCACHE_EXPORT int64_t jax_kvcache_threads(int64_t bytes, int64_t max_threads) {
  return jax_kvcache::WorthThreads(bytes, max_threads);
}
