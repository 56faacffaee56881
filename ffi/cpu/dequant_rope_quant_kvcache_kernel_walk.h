// Owns the kernel's loops over tokens, heads and columns. It is compiled once per instruction set
// and in the unnamed namespace, for the reason that simd_types.h gives.
#ifndef JAX_KVCACHE_FFI_CPU_DEQUANT_ROPE_QUANT_KVCACHE_KERNEL_WALK_H_
#define JAX_KVCACHE_FFI_CPU_DEQUANT_ROPE_QUANT_KVCACHE_KERNEL_WALK_H_

#include <cstdint>
#include <type_traits>

#include "cpu/dequant_rope_quant_kvcache_kernel.h"
#include "cpu/dequant_rope_quant_kvcache_kernel_stages.h"
#include "cpu/simd.h"
#include "cpu/simd_loops.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {
namespace {

// The computation of one part.
template <typename X, typename Table, typename Bias>
class PartWalk {
 public:
  PartWalk(const Shape& shape, const Buffers& buffers, const Part& part)
      : shape_(shape),
        b_(buffers),
        part_(part),
        head_dim_(shape.head_dim),
        half_dim_(shape.head_dim / 2),
        fused_width_(shape.fused_width()),
        row_size_(shape.row_size()),
        num_q_heads_(shape.num_q_heads),
        first_v_head_(shape.num_q_heads + shape.num_kv_heads) {}

  JAX_KVCACHE_INLINE void Run() {
    const bool shared = shape_.SharesParameters();
    int64_t token = part_.token_begin;
    while (token < part_.token_end) {
      const int64_t group = token / shape_.tokens;
      const int64_t group_end = (group + 1) * shape_.tokens;
      const int64_t end = shared ? part_.token_end : Min(part_.token_end, group_end);
      FindParameters(group);
      for (; token + kTokensTogether <= end; token += kTokensTogether)
        Tokens<kTokensTogether>(token);
      for (; token < end; ++token) Tokens<1>(token);
    }
  }

 private:
  static constexpr bool kXIsAccumulator = std::is_same_v<X, int32_t>;
  static constexpr bool kHasBias = !std::is_same_v<Bias, NoBias>;

  // The columns of each half of a head whose angles are kept while all heads are processed.
  static constexpr int kAngleColumns = 64;

  // The arrays of one token.
  struct Token {
    const X* x;  // [H]
    float activation_scale;
    const Table* cos;  // [D]
    const Table* sin;  // [D]
    Table* q;          // [Nq, D]
    Table* k;          // [Nkv, D]; null without kv_output
    Table* v;          // [Nkv, D]; null without kv_output
    int8_t* k_row;     // [Nkv, D]; null if the token is skipped
    int8_t* v_row;     // [Nkv, D]; null if the token is skipped
  };

  JAX_KVCACHE_INLINE void FindParameters(int64_t group) {
    scale_k_ = b_.scale_k + shape_.ParameterBlock(kScaleK, group) * row_size_;
    scale_v_ = b_.scale_v + shape_.ParameterBlock(kScaleV, group) * row_size_;
    offset_k_ = Advance(b_.offset_k, shape_.ParameterBlock(kOffsetK, group) * row_size_);
    offset_v_ = Advance(b_.offset_v, shape_.ParameterBlock(kOffsetV, group) * row_size_);
    weight_scale_ =
        Advance(b_.weight_scale, shape_.ParameterBlock(kWeightScale, group) * fused_width_);
    bias_ = Advance(static_cast<const Bias*>(b_.bias),
                    shape_.ParameterBlock(kBias, group) * fused_width_);
  }

  JAX_KVCACHE_INLINE Token Find(int64_t token) const {
    Token t;
    t.x = static_cast<const X*>(b_.x) + token * fused_width_;
    t.activation_scale = b_.activation_scale == nullptr ? 1.0f : b_.activation_scale[token];
    t.cos = static_cast<const Table*>(b_.cos) + token * head_dim_;
    t.sin = static_cast<const Table*>(b_.sin) + token * head_dim_;
    t.q = static_cast<Table*>(b_.q) + token * num_q_heads_ * head_dim_;
    t.k = Advance(static_cast<Table*>(b_.k), token * row_size_);
    t.v = Advance(static_cast<Table*>(b_.v), token * row_size_);
    t.k_row = nullptr;
    t.v_row = nullptr;
    const int64_t slot = b_.slots[token];
    if (slot >= 0 && slot < shape_.rows) {
      const int64_t row = token / shape_.tokens * shape_.rows + slot;
      t.k_row = b_.k_cache + row * row_size_;
      t.v_row = b_.v_cache + row * row_size_;
      // The row may be anywhere in a large cache: fetch it while the q heads are computed.
      PrefetchRow(t.k_row, row_size_);
      PrefetchRow(t.v_row, row_size_);
    }
    return t;
  }

  // Processes M tokens from `first` on, head by head: what the tokens share is read once for all of
  // them, and several rows are fetched from memory at the same time. Of M = 1, 2 and 4, 4 is
  // fastest.
  template <int M>
  JAX_KVCACHE_INLINE void Tokens(int64_t first) const {
    Token tokens[M];
    for (int m = 0; m < M; ++m) tokens[m] = Find(first + m);
    if (kLanes == 4 && half_dim_ < 4) {
      for (const Token& token : tokens) NarrowHeads(token);
    } else {
      Heads<kLanes, M>(tokens);
    }
  }

  // Processes heads of fewer than 8 columns. Only the baseline gets them: see SelectKernel.
  __attribute__((noinline)) void NarrowHeads(const Token& token) const {
    const Token tokens[1] = {token};
    if constexpr (kLanes == 4) Heads<1, 1>(tokens);
  }

  template <int N, int M>
  JAX_KVCACHE_INLINE void Heads(const Token (&tokens)[M]) const {
    if (part_.head_begin < first_v_head_) {
      for (int64_t begin = 0; begin < half_dim_; begin += kAngleColumns) {
        RotateColumns<N, M>(tokens, begin);
      }
    }
    for (int64_t head = Max(part_.head_begin, first_v_head_); head < part_.head_end; ++head) {
      CopyHead<N, M>(tokens, head);
    }
  }

  // Processes the heads of q and k: kAngleColumns columns of each half from `begin` on, or as many
  // as there are.
  template <int N, int M>
  JAX_KVCACHE_INLINE void RotateColumns(const Token (&tokens)[M], int64_t begin) const {
    const int64_t end = Min(begin + kAngleColumns, half_dim_);
    begin = Min(begin, end - N);
    const int64_t q_end = Min(part_.head_end, num_q_heads_);
    const int64_t k_begin = Max(part_.head_begin, num_q_heads_);
    const int64_t k_end = Min(part_.head_end, first_v_head_);

    Angles<N, Table> angles[kAngleColumns / N][M];
    int i = 0;
    for (int64_t column = begin; column < end; column = NextColumns<N>(column, end), ++i) {
      for (int m = 0; m < M; ++m) {
        angles[i][m].Read(tokens[m].cos + column, tokens[m].sin + column, half_dim_);
      }
    }
    for (int64_t head = part_.head_begin; head < q_end; ++head) {
      i = 0;
      for (int64_t column = begin; column < end; column = NextColumns<N>(column, end), ++i) {
        RotateQ<N, M>(tokens, angles[i], head * head_dim_ + column);
      }
    }
    for (int64_t head = k_begin; head < k_end; ++head) {
      i = 0;
      for (int64_t column = begin; column < end; column = NextColumns<N>(column, end), ++i) {
        RotateK<N, M>(tokens, angles[i], head * head_dim_ + column);
      }
    }
  }

  // Columns [at, at + N) of a row of x, and those D/2 further on.
  template <int N, int M>
  JAX_KVCACHE_INLINE void RotateQ(const Token (&tokens)[M], const Angles<N, Table> (&angles)[M],
                                  int64_t at) const {
    const auto dequantizers = DequantizersAt<N>(at);
    for (int m = 0; m < M; ++m) {
      const Token& t = tokens[m];
      StoreHalves<N>(angles[m].Rotate(Values<N>(t, at, dequantizers)), t.q + at);
    }
  }

  template <int N, int M>
  JAX_KVCACHE_INLINE void RotateK(const Token (&tokens)[M], const Angles<N, Table> (&angles)[M],
                                  int64_t at) const {
    const int64_t k_at = at - num_q_heads_ * head_dim_;
    const auto dequantizers = DequantizersAt<N>(at);
    const Quantizer<N> low_codes(scale_k_ + k_at, Advance(offset_k_, k_at));
    const Quantizer<N> high_codes(scale_k_ + k_at + half_dim_,
                                  Advance(offset_k_, k_at + half_dim_));
    for (int m = 0; m < M; ++m) {
      const Token& t = tokens[m];
      const Halves<Floats<N>> k = angles[m].Rotate(Values<N>(t, at, dequantizers));
      if (t.k != nullptr) StoreHalves<N>(k, t.k + k_at);
      if (t.k_row != nullptr) {
        low_codes.Put(RoundTo<Compute, N>(k.low), t.k_row + k_at);
        high_codes.Put(RoundTo<Compute, N>(k.high), t.k_row + k_at + half_dim_);
      }
    }
  }

  // Processes one head of v.
  template <int N, int M>
  JAX_KVCACHE_INLINE void CopyHead(const Token (&tokens)[M], int64_t head) const {
    for (int64_t column = 0; column < head_dim_; column = NextColumns<N>(column, head_dim_)) {
      const int64_t at = head * head_dim_ + column;
      const int64_t v_at = at - first_v_head_ * head_dim_;
      const auto values = DequantizerAt<N>(at);
      const Quantizer<N> codes(scale_v_ + v_at, Advance(offset_v_, v_at));
      for (int m = 0; m < M; ++m) {
        const Token& t = tokens[m];
        const Floats<N> value = values.Value(t.x + at, t.activation_scale);
        if (t.v != nullptr) Store<N>(value, t.v + v_at);
        if (t.v_row != nullptr) codes.Put(value, t.v_row + v_at);
      }
    }
  }

  template <int N>
  JAX_KVCACHE_INLINE Dequantizer<N, X, Bias> DequantizerAt(int64_t column) const {
    return {kXIsAccumulator ? weight_scale_ + column : nullptr,
            kHasBias ? bias_ + column : nullptr};
  }

  template <int N>
  JAX_KVCACHE_INLINE Halves<Dequantizer<N, X, Bias>> DequantizersAt(int64_t column) const {
    return {DequantizerAt<N>(column), DequantizerAt<N>(column + half_dim_)};
  }

  using Compute = typename Angles<1, Table>::Compute;

  template <int N>
  JAX_KVCACHE_INLINE Halves<Floats<N>> Values(
      const Token& t, int64_t at, const Halves<Dequantizer<N, X, Bias>>& dequantizers) const {
    const Halves<Floats<N>> x = {dequantizers.low.Value(t.x + at, t.activation_scale),
                                 dequantizers.high.Value(t.x + at + half_dim_, t.activation_scale)};
    if constexpr (!kXIsAccumulator) return x;  // already in the tables' type
    return {RoundTo<Compute, N>(x.low), RoundTo<Compute, N>(x.high)};
  }

  template <int N>
  JAX_KVCACHE_INLINE void StoreHalves(const Halves<Floats<N>>& value, Table* to) const {
    StoreTwo<N>(value.low, value.high, to, to + half_dim_);
  }

  const Shape& shape_;
  const Buffers& b_;
  const Part& part_;
  const int64_t head_dim_;
  const int64_t half_dim_;
  const int64_t fused_width_;
  const int64_t row_size_;
  const int64_t num_q_heads_;
  const int64_t first_v_head_;
  // Of the current group:
  const float* scale_k_;
  const float* scale_v_;
  const float* offset_k_;
  const float* offset_v_;
  const float* weight_scale_;
  const Bias* bias_;
};

}  // namespace
}  // namespace jax_kvcache::dequant_rope_quant_kvcache

#endif  // JAX_KVCACHE_FFI_CPU_DEQUANT_ROPE_QUANT_KVCACHE_KERNEL_WALK_H_
