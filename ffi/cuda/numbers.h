// Owns the arithmetic on single numbers that must give the same bits on a GPU and on the host. On a
// GPU every operation is an intrinsic that rounds once to nearest even and that the compiler may
// not contract into a fused multiply-add; on the host the build forbids contraction.
#ifndef JAX_KVCACHE_FFI_CUDA_NUMBERS_H_
#define JAX_KVCACHE_FFI_CUDA_NUMBERS_H_

#include <cstdint>
#include <type_traits>

#include "cuda/device.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include <cmath>
#endif

namespace jax_kvcache::cuda {

// A float16 and a bfloat16 by their bits.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

#if defined(__CUDACC__)

JAX_KVCACHE_DEVICE float ToFloat(Half value) { return __half2float(__ushort_as_half(value.bits)); }
JAX_KVCACHE_DEVICE Half ToHalf(float value) { return {__half_as_ushort(__float2half_rn(value))}; }
JAX_KVCACHE_DEVICE BFloat ToBFloat(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

JAX_KVCACHE_DEVICE float Multiply(float a, float b) { return __fmul_rn(a, b); }
JAX_KVCACHE_DEVICE float Add(float a, float b) { return __fadd_rn(a, b); }
JAX_KVCACHE_DEVICE float Divide(float a, float b) { return __fdiv_rn(a, b); }
JAX_KVCACHE_DEVICE Half Multiply(Half a, Half b) {
  return {__half_as_ushort(__hmul_rn(__ushort_as_half(a.bits), __ushort_as_half(b.bits)))};
}
JAX_KVCACHE_DEVICE Half Add(Half a, Half b) {
  return {__half_as_ushort(__hadd_rn(__ushort_as_half(a.bits), __ushort_as_half(b.bits)))};
}

// The nearest integer, half to even; what int32 cannot hold becomes its smallest or largest value.
// The result for NaN is any integer.
JAX_KVCACHE_DEVICE int32_t RoundToInt(float value) { return __float2int_rn(value); }

#else

inline float ToFloat(Half value) {
  const uint32_t sign = (value.bits & 0x8000U) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1FU;
  const uint32_t fraction = value.bits & 0x3FFU;
  if (exponent == 0x1F) return BitCast<float>(sign | 0x7F800000U | fraction << 13);
  if (exponent != 0) return BitCast<float>(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
  return sign != 0 ? -magnitude : magnitude;
}
inline Half ToHalf(float value) {
  const uint32_t bits = BitCast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000U;
  const float magnitude = std::fabs(value);
  if (!(magnitude <= 3e38f)) {
    return {static_cast<uint16_t>(sign | (magnitude > 3e38f ? 0x7C00U : 0x7E00U))};
  }
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00U)};
  // Below 2**-14 the result is a multiple of 2**-24, whose number is also its bits.
  if (magnitude < 0x1p-14f) {
    return {
        static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(magnitude * 0x1p24f)))};
  }
  const uint32_t rebiased = (bits & 0x7FFFFFFFU) - (112U << 23);
  const uint32_t rounded = rebiased + 0xFFFU + (rebiased >> 13 & 1U);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}
inline BFloat ToBFloat(float value) {
  const uint32_t bits = BitCast<uint32_t>(value);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return {static_cast<uint16_t>(bits >> 16 | 0x40U)};
  return {static_cast<uint16_t>((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16)};
}

inline float Multiply(float a, float b) { return a * b; }
inline float Add(float a, float b) { return a + b; }
inline float Divide(float a, float b) { return a / b; }
// float32 holds the product of two float16 exactly, and has 24 >= 2 * 11 + 2 significant bits, with
// which rounding a sum twice gives the same result as rounding it once.
inline Half Multiply(Half a, Half b) { return ToHalf(ToFloat(a) * ToFloat(b)); }
inline Half Add(Half a, Half b) { return ToHalf(ToFloat(a) + ToFloat(b)); }

inline int32_t RoundToInt(float value) {
  const float rounded = std::nearbyint(value);
  if (rounded >= 0x1p31f) return INT32_MAX;
  return rounded >= -0x1p31f ? static_cast<int32_t>(rounded) : INT32_MIN;
}

#endif

JAX_KVCACHE_DEVICE float ToFloat(BFloat value) {
  return BitCast<float>(static_cast<uint32_t>(value.bits) << 16);
}
JAX_KVCACHE_DEVICE float ToFloat(float value) { return value; }
JAX_KVCACHE_DEVICE float ToFloat(int32_t value) { return static_cast<float>(value); }

JAX_KVCACHE_DEVICE float Negate(float value) { return -value; }
JAX_KVCACHE_DEVICE Half Negate(Half value) { return {static_cast<uint16_t>(value.bits ^ 0x8000U)}; }

// The nearest value of type T.
template <typename T>
JAX_KVCACHE_DEVICE T RoundTo(float value) {
  if constexpr (std::is_same_v<T, Half>) {
    return ToHalf(value);
  } else if constexpr (std::is_same_v<T, BFloat>) {
    return ToBFloat(value);
  } else {
    return value;
  }
}

// clip(rint(value / scale + offset), -128, 127), and 0 for NaN.
JAX_KVCACHE_DEVICE int8_t Code(float value, float scale, float offset) {
  const float z = Add(Divide(value, scale), offset);
  const int32_t rounded = z == z ? RoundToInt(z) : 0;
  return static_cast<int8_t>(rounded < -128 ? -128 : rounded > 127 ? 127 : rounded);
}

}  // namespace jax_kvcache::cuda

#endif  // JAX_KVCACHE_FFI_CUDA_NUMBERS_H_
