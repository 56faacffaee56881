// Owns the loads and stores of the CPU kernels: N float32 lanes at a time, each value exact or
// rounded once, with the same bits on every instruction set.
#ifndef JAX_KVCACHE_FFI_CPU_SIMD_H_
#define JAX_KVCACHE_FFI_CPU_SIMD_H_

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd_convert.h"
#include "cpu/simd_types.h"

namespace jax_kvcache {
namespace {

// Loads N elements as float32: exactly, except that int32 is rounded to nearest even.
template <int N>
JAX_KVCACHE_INLINE Floats<N> Load(const float* from) {
  return LoadBits<Floats<N>>(from);
}
template <int N>
JAX_KVCACHE_INLINE Floats<N> Load(const int32_t* from) {
  return __builtin_convertvector(LoadBits<Ints<N>>(from), Floats<N>);
}
template <int N>
JAX_KVCACHE_INLINE Floats<N> Load(const Half* from) {
  return FromHalfBits<N>(LoadBits<Shorts<N>>(from));
}
template <int N>
JAX_KVCACHE_INLINE Floats<N> Load(const BFloat* from) {
  return FromBFloatBits<N>(LoadBits<Shorts<N>>(from));
}

// Stores N float32 values in the type of `to`, rounding to nearest even.
template <int N>
JAX_KVCACHE_INLINE void Store(Floats<N> value, float* to) {
  std::memcpy(to, &value, sizeof(value));
}
template <int N>
JAX_KVCACHE_INLINE void Store(Floats<N> value, Half* to) {
  const Shorts<N> bits = ToHalfBits<N>(value);
  std::memcpy(to, &bits, sizeof(bits));
}
template <int N>
JAX_KVCACHE_INLINE void Store(Floats<N> value, BFloat* to) {
  const Shorts<N> bits = ToBFloatBits<N>(value);
  std::memcpy(to, &bits, sizeof(bits));
}

// Stores N float32 values at each of two places, as Store does.
template <int N, typename T>
JAX_KVCACHE_INLINE void StoreTwo(Floats<N> low, Floats<N> high, T* to_low, T* to_high) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (N == 8 && std::is_same_v<T, BFloat>) {
    // Narrowed together, in fewer instructions than apart.
    const __m256i words = _mm256_packus_epi32(BitCast<__m256i>(ToWideBFloatBits<N>(low)),
                                              BitCast<__m256i>(ToWideBFloatBits<N>(high)));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0b11011000);
    const __m128i halves[2] = {_mm256_castsi256_si128(ordered),
                               _mm256_extracti128_si256(ordered, 1)};
    std::memcpy(to_low, &halves[0], sizeof(halves[0]));
    std::memcpy(to_high, &halves[1], sizeof(halves[1]));
    return;
  }
#endif
  Store<N>(low, to_low);
  Store<N>(high, to_high);
}

// The value rounded to the type T, as float32.
template <typename T, int N>
JAX_KVCACHE_INLINE Floats<N> RoundTo(Floats<N> value) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, Half>);
  if constexpr (std::is_same_v<T, Half>) {
    return FromHalfBits<N>(ToHalfBits<N>(value));
  } else {
    return value;
  }
}

// Stores clip(rint(z), -128, 127) as N bytes; NaN becomes 0.
template <int N>
JAX_KVCACHE_INLINE void StoreCodes(Floats<N> z, int8_t* to) {
  const Bytes<N> codes = ToCodes<N>(z);
  std::memcpy(to, &codes, sizeof(codes));
}

}  // namespace
}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_CPU_SIMD_H_
