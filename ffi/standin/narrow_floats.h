// Owns the conversions of single float16 and bfloat16 values, written from the formats'
// definitions.
#ifndef JAX_KVCACHE_FFI_STANDIN_NARROW_FLOATS_H_
#define JAX_KVCACHE_FFI_STANDIN_NARROW_FLOATS_H_

#include <cstdint>
#include <cstring>

namespace standin {

inline float FloatFromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 0x1F;
  const uint32_t fraction = half & 0x3FF;
  if (exponent == 0x1F) return FloatFromBits(sign | 0x7F800000 | fraction << 13);
  if (exponent != 0) return FloatFromBits(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = static_cast<float>(fraction) * 0x1p-24F;
  return sign != 0 ? -magnitude : magnitude;
}

// `value` without its last `drop` bits, 1 to 63, rounded to nearest even.
inline uint64_t RoundShift(uint64_t value, int drop) {
  const uint64_t kept = value >> drop;
  const uint64_t rest = value & ((uint64_t{1} << drop) - 1);
  const uint64_t half = uint64_t{1} << (drop - 1);
  return kept + (rest > half || (rest == half && (kept & 1) != 0) ? 1 : 0);
}

// The nearest float16. From double, so that the sum of two float16 values, which is exact in
// double, is rounded once.
inline uint16_t ToHalf(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint64_t sign = bits >> 48 & 0x8000;
  const uint64_t magnitude = bits & 0x7FFFFFFFFFFFFFFF;
  if (magnitude > 0x7FF0000000000000) return static_cast<uint16_t>(sign | 0x7E00);  // NaN
  constexpr int kBiasDifference = 1023 - 15;
  const int exponent = static_cast<int>(magnitude >> 52) - kBiasDifference;  // float16's
  if (exponent >= 0x1F) return static_cast<uint16_t>(sign | 0x7C00);
  if (exponent >= 1) {
    // If rounding carries into the exponent, that is the next power of two, or infinity.
    const uint64_t rebiased = magnitude - (static_cast<uint64_t>(kBiasDifference) << 52);
    return static_cast<uint16_t>(sign | RoundShift(rebiased, 42));
  }
  // Below half of the smallest subnormal.
  if (exponent < -10) return static_cast<uint16_t>(sign);
  const uint64_t significand = (magnitude & 0xFFFFFFFFFFFFF) | 0x10000000000000;
  return static_cast<uint16_t>(sign | RoundShift(significand, 43 - exponent));
}

inline float RoundToHalf(double value) { return HalfToFloat(ToHalf(value)); }

inline float BfloatToFloat(uint16_t bfloat) {
  return FloatFromBits(static_cast<uint32_t>(bfloat) << 16);
}

inline uint16_t ToBfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN
  return static_cast<uint16_t>(RoundShift(bits, 16));
}

}  // namespace standin

#endif  // JAX_KVCACHE_FFI_STANDIN_NARROW_FLOATS_H_
