// Owns the vector types that the CPU kernels are written in: N lanes, and the widest N in use.
//
// A kernel is compiled once per instruction set. Everything here is in the unnamed namespace, so
// that the linker cannot replace one instruction set's function by another's of the same name.
// Arithmetic uses the compilers' vector extension, and intrinsics where that extension has no
// operation. Nothing here multiplies and adds with a single rounding.
#ifndef JAX_KVCACHE_FFI_CPU_SIMD_TYPES_H_
#define JAX_KVCACHE_FFI_CPU_SIMD_TYPES_H_

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

// The float32 lanes of this instruction set's widest vector. Kernels take kLanes columns at a
// time, or one.
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

// A build may define this differently: inlined everywhere and with sanitizers, a kernel takes
// minutes to compile.
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

#endif  // JAX_KVCACHE_FFI_CPU_SIMD_TYPES_H_
