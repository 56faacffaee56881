// Owns what one GPU thread of dequant_rope_quant_kvcache computes: a few columns of both halves of
// one head, of some tokens. The tests run all threads of a call one after the other on the host.
#ifndef JAX_KVCACHE_FFI_CUDA_DEQUANT_ROPE_QUANT_KVCACHE_THREAD_H_
#define JAX_KVCACHE_FFI_CUDA_DEQUANT_ROPE_QUANT_KVCACHE_THREAD_H_

#include <cstdint>
#include <type_traits>

#include "core/dequant_rope_quant_kvcache_buffers.h"
#include "cuda/dequant_rope_quant_kvcache_plan.h"
#include "cuda/numbers.h"

namespace jax_kvcache::dequant_rope_quant_kvcache::cuda {

using jax_kvcache::cuda::Add;
using jax_kvcache::cuda::Advance;
using jax_kvcache::cuda::BFloat;
using jax_kvcache::cuda::BitCast;
using jax_kvcache::cuda::Code;
using jax_kvcache::cuda::Half;
using jax_kvcache::cuda::LoadPack;
using jax_kvcache::cuda::Multiply;
using jax_kvcache::cuda::Negate;
using jax_kvcache::cuda::Pack;
using jax_kvcache::cuda::RoundTo;
using jax_kvcache::cuda::StorePack;
using jax_kvcache::cuda::ToFloat;

// X: the type of x. Table: that of cos, sin, q, k and v. N: the columns of each half that the
// thread computes.
template <typename X, typename Table, int N>
class Thread {
 public:
  // The rotation rounds to float16 with float16 tables, and else to float32.
  using Compute = std::conditional_t<std::is_same_v<Table, Half>, Half, float>;
  static constexpr bool kXIsAccumulator = std::is_same_v<X, int32_t>;

  JAX_KVCACHE_DEVICE Thread(const Shape& shape, const Buffers& buffers)
      : shape_(shape), b_(buffers) {}

  // Thread `index` of the call's; one past the last does nothing. Neighbouring threads have
  // neighbouring columns, then neighbouring heads, then neighbouring tokens.
  JAX_KVCACHE_DEVICE void Run(uint32_t index, int tokens_per_thread) {
    // In 32 bits, in which a GPU divides several times faster than in 64.
    half_dim_ = static_cast<uint32_t>(shape_.head_dim) / 2;
    const uint32_t lanes = half_dim_ / N;
    const auto num_heads = static_cast<uint32_t>(shape_.num_heads());
    const auto runs = static_cast<uint32_t>(  // of tokens, per group
        jax_kvcache::cuda::CeilDivide<int64_t>(shape_.tokens, tokens_per_thread));
    column_ = index % lanes * N;
    uint32_t rest = index / lanes;
    const uint32_t head = rest % num_heads;
    rest /= num_heads;
    const uint32_t group = rest / runs;
    if (group >= shape_.groups.count) return;
    const int64_t begin = int64_t{rest % runs} * tokens_per_thread;
    int64_t end = begin + tokens_per_thread;
    if (end > shape_.tokens) end = shape_.tokens;

    is_q_ = head < shape_.num_q_heads;
    is_v_ = head >= shape_.num_q_heads + shape_.num_kv_heads;
    const auto q_heads = static_cast<uint32_t>(shape_.num_q_heads);
    const auto kv_heads = static_cast<uint32_t>(shape_.num_kv_heads);
    x_column_ = head * shape_.head_dim + column_;
    own_head_ = is_q_ ? head : head - q_heads - (is_v_ ? kv_heads : 0);
    LoadParameters(group);
    for (int64_t token = begin; token < end; ++token) {
      Token(group * shape_.tokens + token, group);
    }
  }

 private:
  // Something for the thread's columns of the lower and of the upper half of its head.
  template <typename T>
  struct Halves {
    Pack<T, N> half[2];
  };

  template <typename T>
  JAX_KVCACHE_DEVICE Halves<T> LoadHalves(const T* from) const {
    return {LoadPack<N>(from), LoadPack<N>(from + half_dim_)};
  }
  template <typename T>
  JAX_KVCACHE_DEVICE void StoreHalves(const Halves<T>& values, T* to) const {
    StorePack<N>(values.half[0], to);
    StorePack<N>(values.half[1], to + half_dim_);
  }

  template <typename T>
  JAX_KVCACHE_DEVICE void LoadBias(const void* from, int64_t at) {
    const Halves<T> bias = LoadHalves(static_cast<const T*>(from) + at);
    for (int h = 0; h < 2; ++h) {
      for (int i = 0; i < N; ++i) {
        if constexpr (std::is_same_v<T, int32_t>) {
          bias_.half[h].at[i] = static_cast<uint32_t>(bias.half[h].at[i]);
        } else {
          bias_.half[h].at[i] = BitCast<uint32_t>(ToFloat(bias.half[h].at[i]));
        }
      }
    }
  }

  // Reads what all tokens of the group share.
  JAX_KVCACHE_DEVICE void LoadParameters(int64_t group) {
    if constexpr (kXIsAccumulator) {
      const int64_t width = shape_.fused_width();
      weight_scale_ = LoadHalves(b_.weight_scale +
                                 shape_.ParameterBlock(kWeightScale, group) * width + x_column_);
      has_int32_bias_ = shape_.has_bias && shape_.bias_dtype == DType::kS32;
      has_float_bias_ = shape_.has_bias && !has_int32_bias_;
      if (shape_.has_bias) {
        const int64_t at = shape_.ParameterBlock(kBias, group) * width + x_column_;
        switch (shape_.bias_dtype) {
          case DType::kS32:
            LoadBias<int32_t>(b_.bias, at);
            break;
          case DType::kF16:
            LoadBias<Half>(b_.bias, at);
            break;
          case DType::kBF16:
            LoadBias<BFloat>(b_.bias, at);
            break;
          default:
            LoadBias<float>(b_.bias, at);
        }
      }
    }
    if (is_q_) return;
    const Arg scale = is_v_ ? kScaleV : kScaleK;
    const Arg offset = is_v_ ? kOffsetV : kOffsetK;
    const float* const scales = is_v_ ? b_.scale_v : b_.scale_k;
    const float* const offsets = is_v_ ? b_.offset_v : b_.offset_k;
    const int64_t at = own_head_ * shape_.head_dim + column_;
    scale_ = LoadHalves(scales + shape_.ParameterBlock(scale, group) * shape_.row_size() + at);
    // Without an offset 0 is added, which can only turn -0 into +0, and both have code 0.
    offset_ = {};
    if (offsets != nullptr) {
      offset_ = LoadHalves(offsets + shape_.ParameterBlock(offset, group) * shape_.row_size() + at);
    }
  }

  // x as float32, dequantised if it is int32.
  JAX_KVCACHE_DEVICE Halves<float> Values(int64_t token) const {
    const Halves<X> x =
        LoadHalves(static_cast<const X*>(b_.x) + token * shape_.fused_width() + x_column_);
    Halves<float> values;
    // Without an activation scale 1 is multiplied by, which is exact.
    const float activation_scale =
        kXIsAccumulator && b_.activation_scale != nullptr ? b_.activation_scale[token] : 1.0f;
    for (int h = 0; h < 2; ++h) {
      for (int i = 0; i < N; ++i) {
        if constexpr (kXIsAccumulator) {
          uint32_t sum = static_cast<uint32_t>(x.half[h].at[i]);
          if (has_int32_bias_) sum += bias_.half[h].at[i];  // unsigned: it wraps
          float y = ToFloat(static_cast<int32_t>(sum));
          y = Multiply(y, weight_scale_.half[h].at[i]);
          y = Multiply(y, activation_scale);
          if (has_float_bias_) y = Add(y, BitCast<float>(bias_.half[h].at[i]));
          values.half[h].at[i] = y;
        } else {
          values.half[h].at[i] = ToFloat(x.half[h].at[i]);
        }
      }
    }
    return values;
  }

  // out[j] = x[j + D/2] * -sin[j] + x[j] * cos[j]
  // out[j + D/2] = x[j] * sin[j + D/2] + x[j + D/2] * cos[j + D/2]
  JAX_KVCACHE_DEVICE Halves<float> Rotate(int64_t token, const Halves<float>& x) const {
    const int64_t at = token * shape_.head_dim + column_;
    const Halves<Table> cos = LoadHalves(static_cast<const Table*>(b_.cos) + at);
    const Halves<Table> sin = LoadHalves(static_cast<const Table*>(b_.sin) + at);
    const auto angle = [](Table value) { return RoundTo<Compute>(ToFloat(value)); };
    Halves<float> out;
    for (int i = 0; i < N; ++i) {
      const Compute low = RoundTo<Compute>(x.half[0].at[i]);
      const Compute high = RoundTo<Compute>(x.half[1].at[i]);
      out.half[0].at[i] = ToFloat(Add(Multiply(high, Negate(angle(sin.half[0].at[i]))),
                                      Multiply(low, angle(cos.half[0].at[i]))));
      out.half[1].at[i] = ToFloat(
          Add(Multiply(low, angle(sin.half[1].at[i])), Multiply(high, angle(cos.half[1].at[i]))));
    }
    return out;
  }

  JAX_KVCACHE_DEVICE void Token(int64_t token, int64_t group) const {
    Halves<float> values = Values(token);
    if (!is_v_) values = Rotate(token, values);
    void* const out = is_q_ ? b_.q : is_v_ ? b_.v : b_.k;
    if (out != nullptr) {
      const int64_t heads = is_q_ ? shape_.num_q_heads : shape_.num_kv_heads;
      Halves<Table> rounded;
      for (int h = 0; h < 2; ++h) {
        for (int i = 0; i < N; ++i) {
          rounded.half[h].at[i] = RoundTo<Table>(values.half[h].at[i]);
        }
      }
      StoreHalves(rounded, static_cast<Table*>(out) +
                               (token * heads + own_head_) * shape_.head_dim + column_);
    }
    if (is_q_) return;
    const int64_t slot = b_.slots[token];
    if (slot < 0 || slot >= shape_.rows) return;
    Halves<int8_t> codes;
    for (int h = 0; h < 2; ++h) {
      for (int i = 0; i < N; ++i) {
        codes.half[h].at[i] =
            Code(values.half[h].at[i], scale_.half[h].at[i], offset_.half[h].at[i]);
      }
    }
    const int64_t row = group * shape_.rows + slot;
    StoreHalves(codes, (is_v_ ? b_.v_cache : b_.k_cache) + row * shape_.row_size() +
                           own_head_ * shape_.head_dim + column_);
  }

  const Shape& shape_;
  const Buffers& b_;
  uint32_t half_dim_;
  uint32_t column_;    // the first column in the lower half
  int64_t x_column_;   // the same column in x
  uint32_t own_head_;  // among the heads of q, of k or of v
  bool is_q_;
  bool is_v_;
  bool has_int32_bias_ = false;
  bool has_float_bias_ = false;
  Halves<float> weight_scale_;
  Halves<uint32_t> bias_;  // the bits of an int32, or of a float32 that the bias was converted to
  Halves<float> scale_;
  Halves<float> offset_;
};

}  // namespace jax_kvcache::dequant_rope_quant_kvcache::cuda

#endif  // JAX_KVCACHE_FFI_CUDA_DEQUANT_ROPE_QUANT_KVCACHE_THREAD_H_
