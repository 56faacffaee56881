// Owns the vector types that the kernel is written in: N lanes, and the widest N that there is.
//
// Compiled once per instruction set, so everything is in the unnamed namespace: no variant's code
// can stand in for another's. Arithmetic is the compilers' vector extension; the intrinsics are for
// what that lacks. Nothing here multiplies and adds in one rounding.
#ifndef JAX_KVCACHE_FFI_SIMD_TYPES_H_
#define JAX_KVCACHE_FFI_SIMD_TYPES_H_

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace jax_kvcache {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// The widest vector of this instruction set; kLanes, 4 and 1 are the widths in use.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

template <typename T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
template <int N>
using Floats = typename VectorOf<float, N>::type;
template <int N>
using Ints = typename VectorOf<int32_t, N>::type;
template <int N>
using UInts = typename VectorOf<uint32_t, N>::type;
template <int N>
using Shorts = typename VectorOf<uint16_t, N>::type;
template <int N>
using Bytes = typename VectorOf<int8_t, N>::type;

#ifndef JAX_KVCACHE_INLINE
#define JAX_KVCACHE_INLINE inline __attribute__((always_inline))
#endif

template <typename To, typename From>
JAX_KVCACHE_INLINE To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename Vector>
JAX_KVCACHE_INLINE Vector LoadBits(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

// Lanes of `a` where `mask` is all ones, of `b` where it is zero.
template <int N>
JAX_KVCACHE_INLINE UInts<N> Select(UInts<N> mask, UInts<N> a, UInts<N> b) {
  return (a & mask) | (b & ~mask);
}

}  // namespace
}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_SIMD_TYPES_H_
