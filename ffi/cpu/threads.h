// Owns how many threads an amount of work is worth.
#ifndef JAX_KVCACHE_FFI_CPU_THREADS_H_
#define JAX_KVCACHE_FFI_CPU_THREADS_H_

#include <cstdint>

namespace jax_kvcache {

// The number of threads, from 1 to `max_threads`, for a call that reads and writes `bytes` bytes.
int64_t WorthThreads(int64_t bytes, int64_t max_threads);

}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_CPU_THREADS_H_
