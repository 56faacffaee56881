// Owns a second implementation for the tests: one element at a time, from the semantics, in double
// where that makes one rounding obvious. Shares no arithmetic with the kernel.
#ifndef JAX_KVCACHE_FFI_TESTS_SCALAR_TWIN_H_
#define JAX_KVCACHE_FFI_TESTS_SCALAR_TWIN_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "random_call.h"

namespace jax_kvcache {

// The float16 nearest to `value`, ties to even, as a double.
inline double NearestHalf(double value) {
  if (!std::isfinite(value) || value == 0) return value;
  const int exponent = std::max(std::ilogb(value), -14);
  const double unit = std::ldexp(1.0, exponent - 10);
  const double rounded = std::nearbyint(value / unit) * unit;
  if (std::fabs(rounded) > 65504) return std::copysign(HUGE_VAL, value);
  return std::copysign(rounded, value);
}

inline uint16_t HalfBits(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7E00;
  if (std::isinf(value)) return sign | 0x7C00;
  const double magnitude = std::fabs(value);
  if (magnitude == 0) return sign;
  const int exponent = std::max(std::ilogb(magnitude), -14);
  const int mantissa = static_cast<int>(std::ldexp(magnitude, 10 - exponent));
  return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + mantissa));
}

inline double HalfValue(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int mantissa = bits & 1023;
  double value = 0;
  if (exponent == 31) {
    value = mantissa != 0 ? std::nan("") : HUGE_VAL;
  } else {
    value = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  }
  return (bits & 0x8000) != 0 ? -value : value;
}

inline float BFloatValue(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value = 0;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

inline uint16_t BFloatBits(float value) {
  if (std::isnan(value)) return 0x7FC0;
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t kept = bits >> 16;
  const uint32_t dropped = bits & 0xFFFF;
  const bool up = dropped > 0x8000 || (dropped == 0x8000 && (kept & 1) != 0);
  return static_cast<uint16_t>(kept + (up ? 1 : 0));
}

inline float Element(const OwnedTensor& t, int64_t i) {
  const size_t at = static_cast<size_t>(i);
  switch (t.dtype()) {
    case DType::kF16:
      return static_cast<float>(HalfValue(t.Get<uint16_t>(at)));
    case DType::kBF16:
      return BFloatValue(t.Get<uint16_t>(at));
    case DType::kS32:
      return static_cast<float>(t.Get<int32_t>(at));
    default:
      return t.Get<float>(at);
  }
}

inline void SetElement(OwnedTensor* t, int64_t i, float value) {
  const size_t at = static_cast<size_t>(i);
  if (t->dtype() == DType::kF16) t->Set(at, HalfBits(NearestHalf(value)));
  if (t->dtype() == DType::kBF16) t->Set(at, BFloatBits(value));
  if (t->dtype() == DType::kF32) t->Set(at, value);
}

class ScalarTwin {
 public:
  ScalarTwin(RandomCall* call, const Shape& shape) : c_(*call), s_(shape) {}

  void Run() {
    for (int64_t token = 0; token < s_.groups * s_.tokens; ++token) RunToken(token);
  }

 private:
  // The first element of the block that a parameter gives to this token's group.
  int64_t Block(Arg arg, int64_t token, int64_t size) {
    const Tensor t = c_.args[arg].View();
    int64_t group = token / s_.tokens;
    int64_t index[kMaxGroupRank] = {};
    for (int i = s_.group_rank - 1; i >= 0; --i) {
      index[i] = group % s_.group_dims[i];
      group /= s_.group_dims[i];
    }
    int64_t block = 0;
    for (int i = 0; i < s_.group_rank; ++i) {
      block = block * t.dims[i] + (t.dims[i] == 1 ? 0 : index[i]);
    }
    return block * size;
  }

  float Value(int64_t token, int64_t column) {
    const int64_t hidden = s_.hidden();
    const int64_t at = token * hidden + column;
    if (s_.x != DType::kS32) return Element(c_.args[kX], at);
    int32_t a = c_.args[kX].Get<int32_t>(static_cast<size_t>(at));
    const int64_t bias_at = s_.has_bias ? Block(kBias, token, hidden) + column : 0;
    const bool integer_bias = s_.has_bias && s_.bias == DType::kS32;
    if (integer_bias) {
      const int64_t sum = int64_t{a} + c_.args[kBias].Get<int32_t>(static_cast<size_t>(bias_at));
      a = static_cast<int32_t>(static_cast<uint32_t>(sum));
    }
    volatile float y = static_cast<float>(a);
    y = y * Element(c_.args[kWeightScale], Block(kWeightScale, token, hidden) + column);
    if (s_.has_activation_scale) y = y * Element(c_.args[kActivationScale], token);
    if (s_.has_bias && !integer_bias) y = y + Element(c_.args[kBias], bias_at);
    return y;
  }

  bool HalfTables() const { return s_.table == DType::kF16; }

  // a * b + c * d, each operation rounded in the compute type.
  float Rotated(float a, float b, float c, float d) const {
    if (HalfTables()) {
      const double first = NearestHalf(double{a} * b);
      const double second = NearestHalf(double{c} * d);
      return static_cast<float>(NearestHalf(first + second));
    }
    volatile float first = a * b;
    volatile float second = c * d;
    return first + second;
  }

  int8_t Code(float value, Arg scale, Arg offset, int64_t token, int64_t column) {
    const int64_t width = s_.num_kv * s_.head_dim;
    volatile float z = value / Element(c_.args[scale], Block(scale, token, width) + column);
    if (s_.has_offset) z = z + Element(c_.args[offset], Block(offset, token, width) + column);
    if (std::isnan(z)) return 0;
    return static_cast<int8_t>(std::min(std::max(std::nearbyint(z), -128.0f), 127.0f));
  }

  void RunToken(int64_t token) {
    const int64_t d = s_.head_dim;
    const int64_t half = d / 2;
    const int64_t width = s_.num_kv * d;
    const int32_t slot = c_.args[kSlots].Get<int32_t>(static_cast<size_t>(token));
    const bool writes = slot >= 0 && slot < s_.rows;
    const int64_t row = (token / s_.tokens * s_.rows + slot) * width;
    for (int64_t column = 0; column < s_.hidden(); ++column) {
      const int64_t head = column / d;
      const int64_t j = column % d;
      float result = Value(token, column);
      const bool is_v = head >= s_.num_q + s_.num_kv;
      if (!is_v) {
        const int64_t other_column = j < half ? column + half : column - half;
        float other = Value(token, other_column);
        if (HalfTables()) {
          result = static_cast<float>(NearestHalf(result));
          other = static_cast<float>(NearestHalf(other));
        }
        const float cos = Element(c_.args[kCos], token * d + j);
        const float sin = Element(c_.args[kSin], token * d + j);
        result = Rotated(other, j < half ? -sin : sin, result, cos);
      }
      if (head < s_.num_q) {
        SetElement(&c_.rets[kQOut], token * s_.num_q * d + column, result);
        continue;
      }
      const int64_t at = column - (is_v ? s_.num_q + s_.num_kv : s_.num_q) * d;
      if (s_.kv_output) SetElement(&c_.rets[is_v ? kVOut : kKOut], token * width + at, result);
      if (!writes) continue;
      const int8_t code = is_v ? Code(result, kScaleV, kOffsetV, token, at)
                               : Code(result, kScaleK, kOffsetK, token, at);
      c_.args[is_v ? kVCache : kKCache].Set(static_cast<size_t>(row + at), code);
    }
  }

  RandomCall& c_;
  const Shape& s_;
};

}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_TESTS_SCALAR_TWIN_H_
