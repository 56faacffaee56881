// Owns the conversions between float32 and narrower types: a general form of each, and a
// specialisation where the instruction set has an instruction for it.
#ifndef JAX_KVCACHE_FFI_CPU_SIMD_CONVERT_H_
#define JAX_KVCACHE_FFI_CPU_SIMD_CONVERT_H_

#include "cpu/simd_types.h"

namespace jax_kvcache {
namespace {

template <int N>
JAX_KVCACHE_INLINE UInts<N> Widen(Shorts<N> v) {
  return __builtin_convertvector(v, UInts<N>);
}
// The low 16 bits of each lane. The high 16 bits must be zero.
template <int N>
JAX_KVCACHE_INLINE Shorts<N> Narrow(UInts<N> v) {
  return __builtin_convertvector(v, Shorts<N>);
}

#if defined(__x86_64__)
// GCC 12 compiles the general form of these two into many instructions.
template <>
JAX_KVCACHE_INLINE UInts<4> Widen<4>(Shorts<4> v) {
  const __m128i low = _mm_cvtsi64_si128(BitCast<int64_t>(v));
  return BitCast<UInts<4>>(_mm_unpacklo_epi16(low, _mm_setzero_si128()));
}
template <>
JAX_KVCACHE_INLINE Shorts<4> Narrow<4>(UInts<4> v) {
  const __m128i extended = _mm_srai_epi32(_mm_slli_epi32(BitCast<__m128i>(v), 16), 16);
  return BitCast<Shorts<4>>(_mm_cvtsi128_si64(_mm_packs_epi32(extended, extended)));
}
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
template <>
JAX_KVCACHE_INLINE UInts<8> Widen<8>(Shorts<8> v) {
  return BitCast<UInts<8>>(_mm256_cvtepu16_epi32(BitCast<__m128i>(v)));
}
template <>
JAX_KVCACHE_INLINE Shorts<8> Narrow<8>(UInts<8> v) {
  const __m256i wide = BitCast<__m256i>(v);
  return BitCast<Shorts<8>>(
      _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
}
#endif
#if defined(__AVX512F__)
template <>
JAX_KVCACHE_INLINE UInts<16> Widen<16>(Shorts<16> v) {
  return BitCast<UInts<16>>(_mm512_cvtepu16_epi32(BitCast<__m256i>(v)));
}
template <>
JAX_KVCACHE_INLINE Shorts<16> Narrow<16>(UInts<16> v) {
  return BitCast<Shorts<16>>(_mm512_cvtepi32_epi16(BitCast<__m512i>(v)));
}
#endif

// float16 to float32, exact. Subnormal float16 values are an integer times 2^-24, a product that is
// normal in float32; all others are integer arithmetic. So the thread's flush mode has no effect.
template <int N>
JAX_KVCACHE_INLINE Floats<N> FromHalfBits(Shorts<N> half) {
  const UInts<N> h = Widen<N>(half);
  const UInts<N> sign = (h & 0x8000U) << 16;
  const UInts<N> magnitude = h & 0x7FFFU;
  const UInts<N> normal = (magnitude << 13) + (112U << 23);
  const UInts<N> special = normal + (112U << 23);
  const Floats<N> tiny = __builtin_convertvector(BitCast<Ints<N>>(magnitude), Floats<N>) * 0x1p-24f;
  UInts<N> bits = Select<N>(BitCast<UInts<N>>(magnitude >= 0x7C00U), special, normal);
  bits = Select<N>(BitCast<UInts<N>>(magnitude < 0x0400U), BitCast<UInts<N>>(tiny), bits);
  return BitCast<Floats<N>>(bits | sign);
}

// float32 to float16, to nearest even.
template <int N>
JAX_KVCACHE_INLINE Shorts<N> ToHalfBits(Floats<N> value) {
  const UInts<N> bits = BitCast<UInts<N>>(value);
  const UInts<N> sign = (bits >> 16) & 0x8000U;
  const UInts<N> magnitude = bits & 0x7FFFFFFFU;
  // For results below the smallest normal float16: the last bit of 0.5 in float32 is 2^-24, as is
  // the last bit of a subnormal float16. So adding 0.5 rounds at the right bit.
  const Floats<N> aligned = BitCast<Floats<N>>(magnitude) + 0.5f;
  const UInts<N> subnormal = BitCast<UInts<N>>(aligned) - 0x3F000000U;
  const UInts<N> odd = (magnitude >> 13) & 1U;
  const UInts<N> normal = (magnitude - (112U << 23) + 0xFFFU + odd) >> 13;
  // 65520 and above round to infinity. NaN stays NaN.
  const UInts<N> nan = BitCast<UInts<N>>(magnitude > 0x7F800000U) & 0x0200U;
  const UInts<N> special = nan | 0x7C00U;
  UInts<N> result = Select<N>(BitCast<UInts<N>>(magnitude < 0x38800000U), subnormal, normal);
  result = Select<N>(BitCast<UInts<N>>(magnitude >= 0x477FF000U), special, result);
  return Narrow<N>(result | sign);
}

// bfloat16 to float32, exact, and back, to nearest even.
template <int N>
JAX_KVCACHE_INLINE Floats<N> FromBFloatBits(Shorts<N> bfloat) {
  return BitCast<Floats<N>>(Widen<N>(bfloat) << 16);
}
template <int N>
JAX_KVCACHE_INLINE UInts<N> ToWideBFloatBits(Floats<N> value) {
  const UInts<N> bits = BitCast<UInts<N>>(value);
  const UInts<N> sum = bits + (0x7FFFU + ((bits >> 16) & 1U));
  // For a NaN, the carry of the sum could change the exponent. With all bits set it stays a NaN.
  const UInts<N> nan = BitCast<UInts<N>>(value != value);
  return (sum | nan) >> 16;
}
template <int N>
JAX_KVCACHE_INLINE Shorts<N> ToBFloatBits(Floats<N> value) {
  return Narrow<N>(ToWideBFloatBits<N>(value));
}

// clip(rint(z), -128, 127), halves to even, and 0 for NaN.
template <int N>
JAX_KVCACHE_INLINE Bytes<N> ToCodes(Floats<N> z) {
  const UInts<N> low = BitCast<UInts<N>>(z < -128.0f);
  const UInts<N> high = BitCast<UInts<N>>(z > 127.0f);
  UInts<N> bits = Select<N>(low, BitCast<UInts<N>>(Floats<N>{} - 128.0f), BitCast<UInts<N>>(z));
  bits = Select<N>(high, BitCast<UInts<N>>(Floats<N>{} + 127.0f), bits);
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits of the sum. The value was
  // clipped before so that the sum stays in range; the bounds are integers, so the code is the same
  // as if it were clipped after rounding.
  const UInts<N> integer = BitCast<UInts<N>>(BitCast<Floats<N>>(bits) + 0x1.8p23f) - 0x4B400000U;
  const UInts<N> number = BitCast<UInts<N>>(z == z);
  return __builtin_convertvector(BitCast<Ints<N>>(integer & number), Bytes<N>);
}

#if defined(__x86_64__)
// The conversion to int32 gives -2^31 for values out of range, which then saturates to -128: right
// for large negative values. Values above 127 are clipped before the conversion, and the codes of
// NaN are set to 0 by the mask.
template <>
JAX_KVCACHE_INLINE Bytes<4> ToCodes<4>(Floats<4> z) {
  const __m128 number = _mm_cmpord_ps(z, z);
  const __m128i integer = _mm_cvtps_epi32(_mm_min_ps(z, _mm_set1_ps(127.0f)));
  const __m128i masked = _mm_and_si128(integer, _mm_castps_si128(number));
  const __m128i words = _mm_packs_epi32(masked, masked);
  return BitCast<Bytes<4>>(_mm_cvtsi128_si32(_mm_packs_epi16(words, words)));
}
#elif defined(__aarch64__)
template <>
JAX_KVCACHE_INLINE Floats<4> FromHalfBits<4>(Shorts<4> half) {
  return BitCast<Floats<4>>(vcvt_f32_f16(BitCast<float16x4_t>(half)));
}
template <>
JAX_KVCACHE_INLINE Shorts<4> ToHalfBits<4>(Floats<4> value) {
  return BitCast<Shorts<4>>(vcvt_f16_f32(BitCast<float32x4_t>(value)));
}
// The conversion saturates, and gives 0 for NaN.
template <>
JAX_KVCACHE_INLINE Bytes<4> ToCodes<4>(Floats<4> z) {
  const int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(BitCast<float32x4_t>(z)));
  const int8x8_t codes = vqmovn_s16(vcombine_s16(words, words));
  return BitCast<Bytes<4>>(vget_lane_s32(vreinterpret_s32_s8(codes), 0));
}
#endif

// F16C's conversions, and those of AVX-512, keep float16 subnormals in every flush mode.
#if defined(__AVX2__) && !defined(__AVX512F__)
template <>
JAX_KVCACHE_INLINE Floats<8> FromHalfBits<8>(Shorts<8> half) {
  return _mm256_cvtph_ps(BitCast<__m128i>(half));
}
template <>
JAX_KVCACHE_INLINE Shorts<8> ToHalfBits<8>(Floats<8> value) {
  return BitCast<Shorts<8>>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
template <>
JAX_KVCACHE_INLINE Bytes<8> ToCodes<8>(Floats<8> z) {
  const __m256 number = _mm256_cmp_ps(z, z, _CMP_ORD_Q);
  const __m256i integer = _mm256_cvtps_epi32(_mm256_min_ps(z, _mm256_set1_ps(127.0f)));
  const __m256i masked = _mm256_and_si256(integer, _mm256_castps_si256(number));
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(masked), _mm256_extracti128_si256(masked, 1));
  return BitCast<Bytes<8>>(_mm_cvtsi128_si64(_mm_packs_epi16(words, words)));
}
#endif

#if defined(__AVX512F__)
template <>
JAX_KVCACHE_INLINE Floats<16> FromHalfBits<16>(Shorts<16> half) {
  return _mm512_cvtph_ps(BitCast<__m256i>(half));
}
template <>
JAX_KVCACHE_INLINE Shorts<16> ToHalfBits<16>(Floats<16> value) {
  return BitCast<Shorts<16>>(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
#if defined(__AVX512BF16__)
// One instruction in place of the eight below. In every mode it rounds to nearest even, keeps NaN,
// and flushes float32 subnormals to zero.
template <>
JAX_KVCACHE_INLINE Shorts<16> ToBFloatBits<16>(Floats<16> value) {
  return BitCast<Shorts<16>>(_mm512_cvtneps_pbh(value));
}
#else
template <>
JAX_KVCACHE_INLINE Shorts<16> ToBFloatBits<16>(Floats<16> value) {
  const __m512i bits = BitCast<__m512i>(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_mov_epi32(sum, nan, _mm512_set1_epi32(0x7FC00000));
  return BitCast<Shorts<16>>(_mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
#endif
template <>
JAX_KVCACHE_INLINE Bytes<16> ToCodes<16>(Floats<16> z) {
  const __mmask16 number = _mm512_cmp_ps_mask(z, z, _CMP_ORD_Q);
  const __m512 clipped = _mm512_min_ps(z, _mm512_set1_ps(127.0f));
  return BitCast<Bytes<16>>(_mm512_cvtsepi32_epi8(_mm512_maskz_cvtps_epi32(number, clipped)));
}
#endif

}  // namespace
}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_CPU_SIMD_CONVERT_H_
