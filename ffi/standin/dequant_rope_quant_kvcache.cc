// Owns the stand-in's arithmetic: dequantise, rotate, quantise, write, one scalar at a time.
#include "arithmetic.h"

#include <cmath>
#include <cstring>

#include "device.h"
#include "ledger.h"

namespace standin {
namespace {

float FromBits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t ToBits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const int exponent = (half >> 10) & 0x1F;
  const uint32_t fraction = half & 0x3FF;
  if (exponent == 0x1F) return FromBits(sign | 0x7F800000 | fraction << 13);
  if (exponent != 0)
    return FromBits(sign | static_cast<uint32_t>(exponent + 112) << 23 | fraction << 13);
  const float magnitude = static_cast<float>(fraction) * 0x1p-24F;
  return sign != 0 ? -magnitude : magnitude;
}

// Keeps the upper bits of `value` after dropping `drop` bits, to nearest even.
uint32_t RoundShift(uint32_t value, int drop) {
  const uint32_t kept = value >> drop;
  const uint32_t rest = value & ((1U << drop) - 1);
  const uint32_t half = 1U << (drop - 1);
  return kept + (rest > half || (rest == half && (kept & 1) != 0) ? 1 : 0);
}

uint16_t FloatToHalf(float value) {
  const uint32_t bits = ToBits(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  const int exponent = static_cast<int>(magnitude >> 23) - 112;  // in float16's bias
  if (exponent >= 0x1F) return static_cast<uint16_t>(sign | 0x7C00);
  if (exponent >= 1) {
    // A carry out of the fraction runs into the exponent, as it should, up to infinity.
    return static_cast<uint16_t>(sign | RoundShift(magnitude - (112U << 23), 13));
  }
  if (exponent < -10) return static_cast<uint16_t>(sign);  // below half the smallest subnormal
  const uint32_t fraction = (magnitude & 0x7FFFFF) | 0x800000;
  return static_cast<uint16_t>(sign | RoundShift(fraction, 14 - exponent));
}

float RoundToHalf(float value) { return HalfToFloat(FloatToHalf(value)); }

uint16_t FloatToBfloat(float value) {
  const uint32_t bits = ToBits(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>(RoundShift(bits, 16));
}

// The device's view of one operand.
struct View {
  explicit View(const aclTensor& tensor) : dtype(tensor.dtype), data(ToHost(tensor.data)) {}

  float Float(int64_t i) const {
    switch (dtype) {
      case ACL_FLOAT16:
        return HalfToFloat(static_cast<const uint16_t*>(data)[i]);
      case ACL_BF16:
        return FromBits(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16);
      case ACL_INT32:
        return static_cast<float>(Int(i));
      default:
        return static_cast<const float*>(data)[i];
    }
  }
  int32_t Int(int64_t i) const { return static_cast<const int32_t*>(data)[i]; }
  void Store(int64_t i, float value) const {
    static_cast<uint16_t*>(data)[i] =
        dtype == ACL_FLOAT16 ? FloatToHalf(value) : FloatToBfloat(value);
  }

  int dtype;
  void* data;
};

int8_t Code(float value, float scale, const View* offset, int64_t i) {
  float z = value / scale;
  if (offset != nullptr) z += offset->Float(i);
  if (std::isnan(z)) return 0;
  const float rounded = std::nearbyint(z);
  if (rounded > 127.0F) return 127;
  if (rounded < -128.0F) return -128;
  return static_cast<int8_t>(rounded);
}

class Execution {
 public:
  Execution(const Launched& call, float* row) : call_(call), row_(row) {}

  void Run() {
    const int64_t tokens = Dim(kX, 0);
    for (int64_t token = 0; token < tokens; ++token) {
      if (At(kX).dtype == ACL_INT32) {
        Dequantize(token);
      } else {
        for (int64_t c = 0; c < hidden_; ++c) row_[c] = At(kX).Float(token * hidden_ + c);
      }
      Token(token);
    }
  }

 private:
  View At(Operand i) const { return View(call_.tensors[i]); }
  int64_t Dim(Operand i, size_t axis) const { return call_.tensors[i].dims[axis]; }
  float Rounded(float value) const { return half_ ? RoundToHalf(value) : value; }

  void Dequantize(int64_t token) {
    const View bias = At(kBias);
    for (int64_t c = 0; c < hidden_; ++c) {
      uint32_t sum = static_cast<uint32_t>(At(kX).Int(token * hidden_ + c));
      const bool integer_bias = call_.given[kBias] && bias.dtype == ACL_INT32;
      if (integer_bias) sum += static_cast<uint32_t>(bias.Int(c));
      float y = static_cast<float>(static_cast<int32_t>(sum));
      y *= At(kWeightScale).Float(c);
      if (call_.given[kActivationScale]) y *= At(kActivationScale).Float(token);
      if (call_.given[kBias] && !integer_bias) y += bias.Float(c);
      row_[c] = y;
    }
  }

  // Rotates head `head` of the row into out[D].
  void Rotate(int64_t token, int64_t head, float* out) const {
    const View cos = At(kCos);
    const View sin = At(kSin);
    const int64_t half = d_ / 2;
    for (int64_t j = 0; j < half; ++j) {
      const float low = Rounded(row_[head * d_ + j]);
      const float high = Rounded(row_[head * d_ + j + half]);
      const int64_t a = token * d_ + j;
      const int64_t b = a + half;
      out[j] = Rounded(Rounded(high * -sin.Float(a)) + Rounded(low * cos.Float(a)));
      out[j + half] = Rounded(Rounded(low * sin.Float(b)) + Rounded(high * cos.Float(b)));
    }
  }

  // Rotates, outputs and quantises one token.
  void Token(int64_t token) {
    const int32_t slot = At(kIndices).Int(token);
    if (slot >= rows_) Ledger::Get().Fault("slot " + std::to_string(slot) + " is past the cache");
    const bool write = slot >= 0 && slot < rows_;
    std::vector<float> head(d_);
    for (int64_t n = 0; n < num_q_; ++n) {
      Rotate(token, n, head.data());
      for (int64_t j = 0; j < d_; ++j) At(kQOut).Store((token * num_q_ + n) * d_ + j, head[j]);
    }
    for (int64_t n = 0; n < num_kv_; ++n) {
      Rotate(token, num_q_ + n, head.data());
      const float* const v = row_ + (num_q_ + num_kv_ + n) * d_;
      for (int64_t j = 0; j < d_; ++j) {
        const int64_t out = (token * num_kv_ + n) * d_ + j;
        if (call_.kv_output) {
          At(kKOut).Store(out, head[j]);
          At(kVOut).Store(out, v[j]);
        }
        if (!write) continue;
        const int64_t i = n * d_ + j;
        const int64_t cell = slot * num_kv_ * d_ + i;
        Write(kKCache, kScaleK, kOffsetK, head[j], i, cell);
        Write(kVCache, kScaleV, kOffsetV, v[j], i, cell);
      }
    }
  }

  void Write(Operand cache, Operand scale, Operand offset, float value, int64_t i, int64_t cell) {
    const View offsets = At(offset);
    const bool both = call_.given[kOffsetK] && call_.given[kOffsetV];
    static_cast<int8_t*>(At(cache).data)[cell] =
        Code(value, At(scale).Float(i), both ? &offsets : nullptr, i);
  }

  const Launched& call_;
  float* const row_;  // [H]
  const int64_t hidden_ = Dim(kX, 1);
  const int64_t num_kv_ = Dim(kKCache, 2);
  const int64_t d_ = Dim(kKCache, 3);
  const int64_t num_q_ = hidden_ / d_ - 2 * num_kv_;
  const int64_t rows_ = Dim(kKCache, 0) * Dim(kKCache, 1);
  const bool half_ = At(kCos).dtype == ACL_FLOAT16;
};

}  // namespace

void Execute(const Launched& call, float* row) { Execution(call, row).Run(); }

}  // namespace standin
