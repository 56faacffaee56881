// Owns the walk over tokens and heads. Compiled once per instruction set; JAX_KVCACHE_VARIANT names
// the entry point.
#include "kernel_variant.h"

#include <cstdint>
#include <type_traits>

#include "simd.h"
#include "stages.h"

namespace jax_kvcache {
namespace {

// Asks for a cache row that is going to be written.
JAX_KVCACHE_INLINE void PrefetchRow(const int8_t* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, /*rw=*/1);
}

template <typename T>
JAX_KVCACHE_INLINE T* Advance(T* pointer, int64_t count) {
  return pointer == nullptr ? nullptr : pointer + count;
}

// One call's walk over the tokens of one part.
template <typename X, typename Table, typename Bias>
class Walk {
 public:
  Walk(const Shape& shape, const Buffers& buffers, const Part& part)
      : shape_(shape),
        b_(buffers),
        part_(part),
        d_(shape.head_dim),
        half_dim_(shape.head_dim / 2),
        hidden_(shape.hidden()),
        kv_width_(shape.num_kv * shape.head_dim),
        v_first_(shape.num_q + shape.num_kv) {}

  JAX_KVCACHE_INLINE void Run() {
    const bool shared = shape_.SharesParameters();
    int64_t token = part_.token_begin;
    while (token < part_.token_end) {
      const int64_t group = token / shape_.tokens;
      const int64_t group_end = (group + 1) * shape_.tokens;
      const int64_t end = shared || part_.token_end < group_end ? part_.token_end : group_end;
      FindParameters(group);
      for (; token + kTokensTogether <= end; token += kTokensTogether)
        Tokens<kTokensTogether>(token);
      for (; token < end; ++token) Tokens<1>(token);
    }
  }

 private:
  // So many vectors of each half of a head at a time; their angles are read once for all heads.
  static constexpr int kBlocks = 64 / kLanes;

  // What one token reads and writes.
  struct Token {
    const X* x;  // [H]
    float activation_scale;
    const Table* cos;  // [D]
    const Table* sin;  // [D]
    Table* q;          // [Nq, D]
    Table* k;          // [Nkv, D], or null
    Table* v;          // [Nkv, D], or null
    int8_t* k_row;     // [Nkv, D], or null
    int8_t* v_row;     // [Nkv, D], or null
  };

  JAX_KVCACHE_INLINE void FindParameters(int64_t group) {
    scale_k_ = b_.scale_k + shape_.ParameterBlock(kScaleK, group) * kv_width_;
    scale_v_ = b_.scale_v + shape_.ParameterBlock(kScaleV, group) * kv_width_;
    offset_k_ = Advance(b_.offset_k, shape_.ParameterBlock(kOffsetK, group) * kv_width_);
    offset_v_ = Advance(b_.offset_v, shape_.ParameterBlock(kOffsetV, group) * kv_width_);
    weight_scale_ = Advance(b_.weight_scale, shape_.ParameterBlock(kWeightScale, group) * hidden_);
    bias_ =
        Advance(static_cast<const Bias*>(b_.bias), shape_.ParameterBlock(kBias, group) * hidden_);
  }

  JAX_KVCACHE_INLINE Token Find(int64_t token) const {
    Token t;
    t.x = static_cast<const X*>(b_.x) + token * hidden_;
    t.activation_scale = b_.activation_scale == nullptr ? 1.0f : b_.activation_scale[token];
    t.cos = static_cast<const Table*>(b_.cos) + token * d_;
    t.sin = static_cast<const Table*>(b_.sin) + token * d_;
    t.q = static_cast<Table*>(b_.q) + token * shape_.num_q * d_;
    t.k = Advance(static_cast<Table*>(b_.k), token * kv_width_);
    t.v = Advance(static_cast<Table*>(b_.v), token * kv_width_);
    t.k_row = nullptr;
    t.v_row = nullptr;
    const int64_t slot = b_.slots[token];
    if (slot >= 0 && slot < shape_.rows) {
      const int64_t row = token / shape_.tokens * shape_.rows + slot;
      t.k_row = b_.k_cache + row * kv_width_;
      t.v_row = b_.v_cache + row * kv_width_;
      // Rows lie anywhere in a large cache: ask for them while the q heads are computed.
      PrefetchRow(t.k_row, kv_width_);
      PrefetchRow(t.v_row, kv_width_);
    }
    return t;
  }

  // M tokens from `first` on, which go through each head together: what they share is read once for
  // all, and the memory is asked for several rows at a time (measured: 1, 2 and 4).
  template <int M>
  JAX_KVCACHE_INLINE void Tokens(int64_t first) const {
    Token tokens[M];
    for (int m = 0; m < M; ++m) tokens[m] = Find(first + m);

    if (part_.head_begin < v_first_) {
      int64_t column = RotateColumns<kLanes, kBlocks, M>(tokens, 0);
      column = RotateColumns<kLanes, 1, M>(tokens, column);
      column = RotateColumns<4, 1, M>(tokens, column);
      RotateColumns<1, 1, M>(tokens, column);
    }
    for (int64_t head = part_.head_begin > v_first_ ? part_.head_begin : v_first_;
         head < part_.head_end; ++head) {
      int64_t column = CopyColumns<kLanes, M>(tokens, head, 0);
      column = CopyColumns<4, M>(tokens, head, column);
      CopyColumns<1, M>(tokens, head, column);
    }
  }

  // The heads of q and k at columns [begin, D/2) of each half, as far as B * N at a time go.
  // Returns where it stopped.
  template <int N, int B, int M>
  JAX_KVCACHE_INLINE int64_t RotateColumns(const Token (&tokens)[M], int64_t begin) const {
    const int64_t q_end = part_.head_end < shape_.num_q ? part_.head_end : shape_.num_q;
    const int64_t k_begin = part_.head_begin > shape_.num_q ? part_.head_begin : shape_.num_q;
    const int64_t k_end = part_.head_end < v_first_ ? part_.head_end : v_first_;
    int64_t column = begin;
    for (; column + B * N <= half_dim_; column += B * N) {
      Angles<N, Table> angles[M][B];
      for (int m = 0; m < M; ++m) {
        for (int i = 0; i < B; ++i) {
          const int64_t j = column + i * N;
          angles[m][i].Read(tokens[m].cos + j, tokens[m].sin + j, half_dim_);
        }
      }
      for (int64_t head = part_.head_begin; head < q_end; ++head) {
        for (int i = 0; i < B; ++i) {
          const int64_t at = head * d_ + column + i * N;
          const auto dequantizers = DequantizersAt<N>(at);
          for (int m = 0; m < M; ++m) {
            const Token& t = tokens[m];
            StoreHalves<N>(angles[m][i].Rotate(Values<N>(t, at, dequantizers)), t.q + at);
          }
        }
      }
      for (int64_t head = k_begin; head < k_end; ++head) {
        for (int i = 0; i < B; ++i) {
          const int64_t at = head * d_ + column + i * N;
          const int64_t k_at = at - shape_.num_q * d_;
          const auto dequantizers = DequantizersAt<N>(at);
          const Quantizer<N> low_codes(scale_k_ + k_at, Advance(offset_k_, k_at));
          const Quantizer<N> high_codes(scale_k_ + k_at + half_dim_,
                                        Advance(offset_k_, k_at + half_dim_));
          for (int m = 0; m < M; ++m) {
            const Token& t = tokens[m];
            const Halves<Floats<N>> k = angles[m][i].Rotate(Values<N>(t, at, dequantizers));
            if (t.k != nullptr) StoreHalves<N>(k, t.k + k_at);
            if (t.k_row != nullptr) {
              low_codes.Put(RoundTo<Compute, N>(k.low), t.k_row + k_at);
              high_codes.Put(RoundTo<Compute, N>(k.high), t.k_row + k_at + half_dim_);
            }
          }
        }
      }
    }
    return column;
  }

  // One head of v at columns [begin, D), as far as N at a time go. Returns where it stopped.
  template <int N, int M>
  JAX_KVCACHE_INLINE int64_t CopyColumns(const Token (&tokens)[M], int64_t head,
                                         int64_t begin) const {
    int64_t column = begin;
    for (; column + N <= d_; column += N) {
      const int64_t at = head * d_ + column;
      const int64_t v_at = at - v_first_ * d_;
      const auto values = DequantizerAt<N>(at);
      const Quantizer<N> codes(scale_v_ + v_at, Advance(offset_v_, v_at));
      for (int m = 0; m < M; ++m) {
        const Token& t = tokens[m];
        const Floats<N> value = values.Value(t.x + at, t.activation_scale);
        if (t.v != nullptr) Store<N>(value, t.v + v_at);
        if (t.v_row != nullptr) codes.Put(value, t.v_row + v_at);
      }
    }
    return column;
  }

  template <int N>
  JAX_KVCACHE_INLINE Dequantizer<N, X, Bias> DequantizerAt(int64_t column) const {
    return {Advance(weight_scale_, column), Advance(bias_, column)};
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
    if constexpr (!std::is_same_v<X, int32_t>) return x;  // is in the tables' type
    return {RoundTo<Compute, N>(x.low), RoundTo<Compute, N>(x.high)};
  }

  template <int N>
  JAX_KVCACHE_INLINE void StoreHalves(const Halves<Floats<N>>& value, Table* to) const {
    Store<N>(value.low, to);
    Store<N>(value.high, to + half_dim_);
  }

  const Shape& shape_;
  const Buffers& b_;
  const Part& part_;
  const int64_t d_;
  const int64_t half_dim_;
  const int64_t hidden_;
  const int64_t kv_width_;
  const int64_t v_first_;
  const float* scale_k_;
  const float* scale_v_;
  const float* offset_k_;
  const float* offset_v_;
  const float* weight_scale_;
  const Bias* bias_;
};

template <typename X, typename Table, typename Bias>
void Run(const Shape& shape, const Buffers& buffers, const Part& part) {
  Walk<X, Table, Bias>(shape, buffers, part).Run();
}

template <typename Table>
Kernel SelectBias(const Shape& shape) {
  if (!shape.has_bias) return Run<int32_t, Table, NoBias>;
  switch (shape.bias) {
    case DType::kS32:
      return Run<int32_t, Table, int32_t>;
    case DType::kF16:
      return Run<int32_t, Table, Half>;
    case DType::kBF16:
      return Run<int32_t, Table, BFloat>;
    default:
      return Run<int32_t, Table, float>;
  }
}

}  // namespace

Kernel JAX_KVCACHE_VARIANT(const Shape& shape) {
  const bool quantized = shape.x == DType::kS32;
  switch (shape.table) {
    case DType::kF16:
      return quantized ? SelectBias<Half>(shape) : Run<Half, Half, NoBias>;
    case DType::kBF16:
      return quantized ? SelectBias<BFloat>(shape) : Run<BFloat, BFloat, NoBias>;
    default:
      return quantized ? SelectBias<float>(shape) : Run<float, float, NoBias>;
  }
}

}  // namespace jax_kvcache
