// Owns what the kernels' loops over rows and columns need. It is in the unnamed namespace, for the
// reason that simd_types.h gives; std::min and std::max are not, so they are not used there.
#ifndef JAX_KVCACHE_FFI_CPU_SIMD_LOOPS_H_
#define JAX_KVCACHE_FFI_CPU_SIMD_LOOPS_H_

#include <cstdint>

#include "cpu/simd_types.h"

namespace jax_kvcache {
namespace {

JAX_KVCACHE_INLINE int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
JAX_KVCACHE_INLINE int64_t Max(int64_t a, int64_t b) { return a < b ? b : a; }

// `pointer + count`, or null for an optional array that is left out.
template <typename T>
JAX_KVCACHE_INLINE T* Advance(T* pointer, int64_t count) {
  return pointer == nullptr ? nullptr : pointer + count;
}

// The first column of the next N. If fewer than N remain before `end`, the next N overlap those
// before them: they end at `end`, and some columns are computed twice, with the same result.
template <int N>
JAX_KVCACHE_INLINE int64_t NextColumns(int64_t column, int64_t end) {
  column += N;
  return column + N <= end || column >= end ? column : end - N;
}

// Fetches a row that will be written later.
JAX_KVCACHE_INLINE void PrefetchRow(const int8_t* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, /*rw=*/1);
}

}  // namespace
}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_CPU_SIMD_LOOPS_H_
