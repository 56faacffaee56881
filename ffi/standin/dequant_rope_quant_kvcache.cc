// Owns the scalar rendering of dequant_rope_quant_kvcache: dequantise, rotate, quantise, write.
#include "dequant_rope_quant_kvcache.h"

#include <cmath>
#include <vector>

#include "narrow_floats.h"

namespace standin {
namespace {

int32_t Int(const Array& array, int64_t i) { return static_cast<const int32_t*>(array.data)[i]; }

float Float(const Array& array, int64_t i) {
  switch (array.type) {
    case Type::kInt32:
      return static_cast<float>(Int(array, i));
    case Type::kFloat16:
      return HalfToFloat(static_cast<const uint16_t*>(array.data)[i]);
    case Type::kBfloat16:
      return BfloatToFloat(static_cast<const uint16_t*>(array.data)[i]);
    case Type::kFloat32:
      break;
  }
  return static_cast<const float*>(array.data)[i];
}

void Store(const Array& array, int64_t i, float value) {
  if (array.type == Type::kFloat16) {
    static_cast<uint16_t*>(array.data)[i] = ToHalf(value);
  } else if (array.type == Type::kBfloat16) {
    static_cast<uint16_t*>(array.data)[i] = ToBfloat(value);
  } else {
    static_cast<float*>(array.data)[i] = value;
  }
}

int8_t Code(float value, float scale, const Array& offset, int64_t i) {
  float z = value / scale;
  if (offset.data != nullptr) z += Float(offset, i);
  if (std::isnan(z)) return 0;
  const float rounded = std::nearbyint(z);
  if (rounded > 127.0F) return 127;
  if (rounded < -128.0F) return -128;
  return static_cast<int8_t>(rounded);
}

class Execution {
 public:
  Execution(const ScalarCall& call, float* row) : c_(call), row_(row) {}

  void Run() {
    for (int64_t token = 0; token < c_.tokens; ++token) {
      for (int64_t column = 0; column < fused_width_; ++column) {
        row_[column] = Value(token, column);
      }
      WriteToken(token);
    }
  }

 private:
  // x, dequantised if it is int32.
  float Value(int64_t token, int64_t column) const {
    const int64_t i = token * fused_width_ + column;
    if (c_.x.type != Type::kInt32) return Float(c_.x, i);
    const bool has_bias = c_.bias.data != nullptr;
    const bool has_int32_bias = has_bias && c_.bias.type == Type::kInt32;
    uint32_t sum = static_cast<uint32_t>(Int(c_.x, i));  // unsigned: it wraps
    if (has_int32_bias) sum += static_cast<uint32_t>(Int(c_.bias, column));
    float y = static_cast<float>(static_cast<int32_t>(sum));
    y *= Float(c_.weight_scale, column);
    if (c_.activation_scale.data != nullptr) y *= Float(c_.activation_scale, token);
    if (has_bias && !has_int32_bias) y += Float(c_.bias, column);
    return y;
  }

  float Rounded(float value) const { return in_float16_ ? RoundToHalf(value) : value; }

  // a * b + c * d, with every product and the sum rounded once.
  float Rotated(float a, float b, float c, float d) const {
    if (!in_float16_) return a * b + c * d;
    return RoundToHalf(double{RoundToHalf(double{a} * b)} + double{RoundToHalf(double{c} * d)});
  }

  // Rotates head `head` of the row into out[D].
  void Rotate(int64_t token, int64_t head, float* out) const {
    const int64_t half = d_ / 2;
    for (int64_t j = 0; j < half; ++j) {
      const float low = Rounded(row_[head * d_ + j]);
      const float high = Rounded(row_[head * d_ + j + half]);
      const int64_t a = token * d_ + j;
      const int64_t b = a + half;
      out[j] = Rotated(high, -Float(c_.sin, a), low, Float(c_.cos, a));
      out[j + half] = Rotated(low, Float(c_.sin, b), high, Float(c_.cos, b));
    }
  }

  // Rotates the row's heads of q and k, and writes the results and the caches.
  void WriteToken(int64_t token) const {
    std::vector<float> head(static_cast<size_t>(d_));
    for (int64_t n = 0; n < c_.num_q_heads; ++n) {
      Rotate(token, n, head.data());
      for (int64_t j = 0; j < d_; ++j) {
        Store(c_.q, (token * c_.num_q_heads + n) * d_ + j, head[static_cast<size_t>(j)]);
      }
    }
    for (int64_t n = 0; n < c_.num_kv_heads; ++n) {
      Rotate(token, c_.num_q_heads + n, head.data());
      const float* const v = row_ + (c_.num_q_heads + c_.num_kv_heads + n) * d_;
      for (int64_t j = 0; j < d_; ++j)
        WriteKv(token, n * d_ + j, head[static_cast<size_t>(j)], v[j]);
    }
  }

  // Writes the values k and v of column `i` in [0, Nkv * D).
  void WriteKv(int64_t token, int64_t i, float k, float v) const {
    const int64_t row_size = c_.num_kv_heads * d_;
    if (c_.k.data != nullptr) Store(c_.k, token * row_size + i, k);
    if (c_.v.data != nullptr) Store(c_.v, token * row_size + i, v);
    const int64_t slot = c_.slots[token];
    if (slot < 0 || slot >= c_.rows) return;
    c_.k_cache[slot * row_size + i] = Code(k, Float(c_.scale_k, i), c_.offset_k, i);
    c_.v_cache[slot * row_size + i] = Code(v, Float(c_.scale_v, i), c_.offset_v, i);
  }

  const ScalarCall& c_;
  float* const row_;  // [H]
  const int64_t d_ = c_.head_dim;
  const int64_t fused_width_ = c_.fused_width();
  const bool in_float16_ = c_.cos.type == Type::kFloat16;
};

}  // namespace

void Execute(const ScalarCall& call, float* row) { Execution(call, row).Run(); }

}  // namespace standin
