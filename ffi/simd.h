// Owns the vectors that the kernel is written in: N float32 lanes, exact on every instruction set.
//
// Compiled once per instruction set, so everything is in the unnamed namespace: no variant's code
// can stand in for another's. Arithmetic is the compilers' vector extension; the intrinsics are for
// what that lacks. Nothing here multiplies and adds in one rounding.
#ifndef JAX_KVCACHE_FFI_SIMD_H_
#define JAX_KVCACHE_FFI_SIMD_H_

#include <cstdint>
#include <cstring>
#include <type_traits>

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

#define JAX_KVCACHE_INLINE inline __attribute__((always_inline))

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

template <int N>
JAX_KVCACHE_INLINE UInts<N> Widen(Shorts<N> v) {
  return __builtin_convertvector(v, UInts<N>);
}
// The low half of each lane, whose high half is zero.
template <int N>
JAX_KVCACHE_INLINE Shorts<N> Narrow(UInts<N> v) {
  return __builtin_convertvector(v, Shorts<N>);
}

#if defined(__x86_64__)
// GCC 12 makes a long way of these conversions.
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

// float16 -> float32, exact. Integer arithmetic but for the subnormals, whose product is normal, so
// that no flush mode matters.
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

// float32 -> float16, to nearest even.
template <int N>
JAX_KVCACHE_INLINE Shorts<N> ToHalfBits(Floats<N> value) {
  const UInts<N> bits = BitCast<UInts<N>>(value);
  const UInts<N> sign = (bits >> 16) & 0x8000U;
  const UInts<N> magnitude = bits & 0x7FFFFFFFU;
  // Below the least normal float16, 0.5 has the last bit that the result needs: the sum rounds
  // there.
  const Floats<N> aligned = BitCast<Floats<N>>(magnitude) + 0.5f;
  const UInts<N> subnormal = BitCast<UInts<N>>(aligned) - 0x3F000000U;
  const UInts<N> odd = (magnitude >> 13) & 1U;
  const UInts<N> normal = (magnitude - (112U << 23) + 0xFFFU + odd) >> 13;
  // 65520 and above round to infinity; NaN stays one.
  const UInts<N> nan = BitCast<UInts<N>>(magnitude > 0x7F800000U) & 0x0200U;
  const UInts<N> special = nan | 0x7C00U;
  UInts<N> result = Select<N>(BitCast<UInts<N>>(magnitude < 0x38800000U), subnormal, normal);
  result = Select<N>(BitCast<UInts<N>>(magnitude >= 0x477FF000U), special, result);
  return Narrow<N>(result | sign);
}

// bfloat16 -> float32, exact, and back, to nearest even.
template <int N>
JAX_KVCACHE_INLINE Floats<N> FromBFloatBits(Shorts<N> bfloat) {
  return BitCast<Floats<N>>(Widen<N>(bfloat) << 16);
}
template <int N>
JAX_KVCACHE_INLINE Shorts<N> ToBFloatBits(Floats<N> value) {
  const UInts<N> bits = BitCast<UInts<N>>(value);
  const UInts<N> rounded = (bits + (0x7FFFU + ((bits >> 16) & 1U))) >> 16;
  // The sum could carry a NaN into another number.
  const UInts<N> nan = BitCast<UInts<N>>(value != value);
  return Narrow<N>(Select<N>(nan, UInts<N>{} + 0x7FC0U, rounded));
}

// min(max(z, -128), 127). A NaN may come out as anything.
template <int N>
JAX_KVCACHE_INLINE Floats<N> Clip(Floats<N> z) {
  const UInts<N> low = BitCast<UInts<N>>(z < -128.0f);
  const UInts<N> high = BitCast<UInts<N>>(z > 127.0f);
  UInts<N> bits = Select<N>(low, BitCast<UInts<N>>(Floats<N>{} - 128.0f), BitCast<UInts<N>>(z));
  bits = Select<N>(high, BitCast<UInts<N>>(Floats<N>{} + 127.0f), bits);
  return BitCast<Floats<N>>(bits);
}

// The low byte of each lane.
template <int N>
JAX_KVCACHE_INLINE Bytes<N> LowBytes(Ints<N> v) {
  return __builtin_convertvector(v, Bytes<N>);
}

#if defined(__x86_64__)
template <>
JAX_KVCACHE_INLINE Floats<4> Clip<4>(Floats<4> z) {
  return _mm_min_ps(_mm_max_ps(z, _mm_set1_ps(-128.0f)), _mm_set1_ps(127.0f));
}
template <>
JAX_KVCACHE_INLINE Bytes<4> LowBytes<4>(Ints<4> v) {
  const __m128i words = _mm_packs_epi32(BitCast<__m128i>(v), BitCast<__m128i>(v));
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
template <>
JAX_KVCACHE_INLINE Floats<4> Clip<4>(Floats<4> z) {
  const float32x4_t raised = vmaxq_f32(BitCast<float32x4_t>(z), vdupq_n_f32(-128.0f));
  return BitCast<Floats<4>>(vminq_f32(raised, vdupq_n_f32(127.0f)));
}
#endif

#if defined(__AVX2__)
// The conversions of F16C heed neither flush mode where a float16 subnormal is concerned.
template <>
JAX_KVCACHE_INLINE Floats<4> FromHalfBits<4>(Shorts<4> half) {
  return _mm_cvtph_ps(_mm_cvtsi64_si128(BitCast<int64_t>(half)));
}
template <>
JAX_KVCACHE_INLINE Shorts<4> ToHalfBits<4>(Floats<4> value) {
  return BitCast<Shorts<4>>(_mm_cvtsi128_si64(_mm_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT)));
}
#endif

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
JAX_KVCACHE_INLINE Floats<8> Clip<8>(Floats<8> z) {
  return _mm256_min_ps(_mm256_max_ps(z, _mm256_set1_ps(-128.0f)), _mm256_set1_ps(127.0f));
}
template <>
JAX_KVCACHE_INLINE Bytes<8> LowBytes<8>(Ints<8> v) {
  const __m256i wide = BitCast<__m256i>(v);
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
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
// One instruction for the eight below: it rounds to nearest even whatever the mode, keeps a NaN
// one, and flushes subnormals whatever the mode.
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
JAX_KVCACHE_INLINE Floats<16> Clip<16>(Floats<16> z) {
  return _mm512_min_ps(_mm512_max_ps(z, _mm512_set1_ps(-128.0f)), _mm512_set1_ps(127.0f));
}
template <>
JAX_KVCACHE_INLINE Bytes<16> LowBytes<16>(Ints<16> v) {
  return BitCast<Bytes<16>>(_mm512_cvtepi32_epi8(BitCast<__m512i>(v)));
}
#endif

// Loads N elements as float32: exact but for int32, which rounds to nearest even.
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

// The value as the type T holds it.
template <typename T, int N>
JAX_KVCACHE_INLINE Floats<N> RoundTo(Floats<N> value) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, Half>);
  if constexpr (std::is_same_v<T, Half>) {
    return FromHalfBits<N>(ToHalfBits<N>(value));
  } else {
    return value;
  }
}

// clip(rint(z), -128, 127) with NaN -> 0, to N bytes.
template <int N>
JAX_KVCACHE_INLINE void StoreCodes(Floats<N> z, int8_t* to) {
  // Adding 1.5 * 2^23 rounds to an integer, half to even, and leaves it in the low bits; clipping
  // first to integers changes no code and keeps the sum in range.
  const UInts<N> integer = BitCast<UInts<N>>(Clip<N>(z) + 0x1.8p23f) - 0x4B400000U;
  const Bytes<N> codes = LowBytes<N>(BitCast<Ints<N>>(integer & BitCast<UInts<N>>(z == z)));
  std::memcpy(to, &codes, sizeof(codes));
}

}  // namespace
}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_SIMD_H_
