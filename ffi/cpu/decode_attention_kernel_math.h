// Owns the vector arithmetic of the attention kernel: codes to float32, sums over lanes, powers of
// two and the soft cap.
//
// Compiled once per instruction set, as cpu/simd.h is, and with fused multiply-adds where there are
// some: the results of this operator are not fixed to the bit.
#ifndef JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_MATH_H_
#define JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_MATH_H_

#include <cfloat>
#include <cstdint>

#include "cpu/simd.h"

namespace jax_kvcache::decode_attention {
namespace {

using Vector = Floats<kLanes>;

constexpr float kLog2E = 1.44269504f;
constexpr double kLn2 = 0.693147180559945309;
constexpr float kInfinity = __builtin_inff();

JAX_KVCACHE_INLINE Vector LoadVector(const float* from) { return LoadBits<Vector>(from); }
JAX_KVCACHE_INLINE void StoreVector(Vector value, float* to) {
  std::memcpy(to, &value, sizeof(value));
}

// kLanes codes as float32, which is exact.
JAX_KVCACHE_INLINE Vector LoadCodes(const int8_t* from) {
#if defined(__AVX512F__)
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
#elif defined(__AVX2__)
  const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
#elif defined(__x86_64__)
  const __m128i codes = _mm_cvtsi32_si128(LoadBits<int32_t>(from));
  const __m128i words = _mm_unpacklo_epi8(codes, codes);
  return _mm_cvtepi32_ps(_mm_srai_epi32(_mm_unpacklo_epi16(words, words), 24));
#else
  return __builtin_convertvector(LoadBits<Bytes<kLanes>>(from), Vector);
#endif
}

// The greater of the two in each lane, and `b` where `a` is NaN.
JAX_KVCACHE_INLINE Vector Greater(Vector a, Vector b) { return a > b ? a : b; }

// Four vectors' sums over lanes, as far as within 128 bits: lanes 4*i .. 4*i+3 of the result hold
// what lanes 4*i .. 4*i+3 of a, b, c and d add to.
JAX_KVCACHE_INLINE Vector SumQuads(Vector a, Vector b, Vector c, Vector d) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
#elif defined(__AVX2__)
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
#elif defined(__x86_64__)
  const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
  const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
  return _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
#elif defined(__aarch64__)
  const float32x4_t ab = vpaddq_f32(BitCast<float32x4_t>(a), BitCast<float32x4_t>(b));
  const float32x4_t cd = vpaddq_f32(BitCast<float32x4_t>(c), BitCast<float32x4_t>(d));
  return BitCast<Vector>(vpaddq_f32(ab, cd));
#else
  return Vector{a[0] + a[1] + a[2] + a[3], b[0] + b[1] + b[2] + b[3], c[0] + c[1] + c[2] + c[3],
                d[0] + d[1] + d[2] + d[3]};
#endif
}

// Stores the sum over the lanes of each of 8 vectors.
JAX_KVCACHE_INLINE void StoreSums(const Vector (&v)[8], float* to) {
  const Vector low = SumQuads(v[0], v[1], v[2], v[3]);
  const Vector high = SumQuads(v[4], v[5], v[6], v[7]);
#if defined(__AVX512F__)
  const __m512 sum =
      _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x44), _mm512_shuffle_f32x4(low, high, 0xEE));
  const __m512 both = _mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0xB1));
  _mm256_storeu_ps(to, _mm512_castps512_ps256(_mm512_shuffle_f32x4(both, both, 0x08)));
#elif defined(__AVX2__)
  _mm256_storeu_ps(to, _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                                     _mm256_permute2f128_ps(low, high, 0x31)));
#else
  StoreVector(low, to);
  StoreVector(high, to + kLanes);
#endif
}

#if defined(__AVX512F__)
// The same of 16 vectors.
JAX_KVCACHE_INLINE void StoreSums(const Vector (&v)[16], float* to) {
  Vector quads[4];
  for (int i = 0; i < 4; ++i)
    quads[i] = SumQuads(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
  const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(quads[0], quads[1], 0x44),
                                 _mm512_shuffle_f32x4(quads[0], quads[1], 0xEE));
  const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2], quads[3], 0x44),
                                 _mm512_shuffle_f32x4(quads[2], quads[3], 0xEE));
  StoreVector(_mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD)),
              to);
}
#endif

// x as n + f with an integer n and |f| <= 0.5, and (2^f - 1) with a relative error of 8e-8: f *
// P(f) with a minimax polynomial P of degree 5, fitted to the relative error of 1 + f * P(f).
struct PowerOfTwo {
  UInts<kLanes> exponent;  // n in the place of a float's exponent
  Vector f_minus;          // 2^f - 1
};
JAX_KVCACHE_INLINE PowerOfTwo SplitPower(Vector x) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const Vector shifted = x + 0x1.8p23f;
  const Vector f = x - (shifted - 0x1.8p23f);
  Vector p = f * 0x1.41fbaep-13f + 0x1.5f3e6ap-10f;
  p = p * f + 0x1.3b2d4ep-7f;
  p = p * f + 0x1.c6aee8p-5f;
  p = p * f + 0x1.ebfbdcp-3f;
  p = p * f + 0x1.62e430p-1f;
  return {BitCast<UInts<kLanes>>(shifted) << 23, p * f};
}

// 2^x for x <= 0: 0 below -126, NaN of NaN.
JAX_KVCACHE_INLINE Vector Exp2(Vector x) {
  const Vector least = Vector{} - 126.0f;
  const Vector clamped = x < least ? least : x;
  const PowerOfTwo power = SplitPower(clamped);
  const Vector result =
      BitCast<Vector>(BitCast<UInts<kLanes>>(power.f_minus + 1.0f) + power.exponent);
  // Adding to the exponent may make a number of a NaN.
  return x < least ? Vector{} : (x == x ? result : x);
}

// tanh(x * ln(2) / 2) = (2^x - 1) / (2^x + 1), with nothing lost near 0.
JAX_KVCACHE_INLINE Vector TanhOfHalf(Vector x) {
  const Vector most = Vector{} + 40.0f;  // 1 - tanh is below half a unit in the last place there
  Vector clamped = x > most ? most : x;
  clamped = clamped < -most ? -most : clamped;
  const PowerOfTwo power = SplitPower(clamped);
  const Vector two_n = BitCast<Vector>(power.exponent + (127U << 23));
  const Vector minus_one = two_n * power.f_minus + (two_n - 1.0f);
  const Vector result = minus_one / (minus_one + 2.0f);
  return x == x ? result : x;
}

}  // namespace
}  // namespace jax_kvcache::decode_attention

#endif  // JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_MATH_H_
