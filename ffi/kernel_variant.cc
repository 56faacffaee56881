// Owns the walk over tokens and heads. Compiled once per instruction set; JAX_KVCACHE_VARIANT names
// the entry point.
#include "kernel_variant.h"

#include <cstdint>
#include <type_traits>

#include "simd.h"
#include "stages.h"

namespace jax_kvcache {
namespace {

// Asks for a cache row that is going to be written. Asking for the next x and q as well was
// measured: 10 to 30% faster from memory, 15% slower from the cache, where a matmul has just left
// x.
JAX_KVCACHE_INLINE void PrefetchRow(const int8_t* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, /*rw=*/1);
}

template <typename T>
JAX_KVCACHE_INLINE T* Advance(T* pointer, int64_t count) {
  return pointer == nullptr ? nullptr : pointer + count;
}

// What one token reads and writes, at its first column or element.
template <typename X, typename Table, typename Bias>
struct Token {
  TokenInput<X, Bias> in;
  const Table* cos;  // [D]
  const Table* sin;  // [D]
  Table* q;          // [Nq, D]
  Table* k;          // [Nkv, D], or null
  Table* v;          // [Nkv, D], or null
  int8_t* k_row;     // [Nkv, D], or null
  int8_t* v_row;     // [Nkv, D], or null
  Angles angles;
};

// Tokens that share their parameters go through each head together if a row of weight scales and
// bias does not stay in a first-level cache by itself (48 KB at H = 6144): a head's part of them, 1
// KB at D = 128, then does. Narrower rows go one by one, which reads x in longer runs.
constexpr int kTokensTogether = 4;
constexpr int64_t kNarrow = 4096;  // columns: 32 KB of float32 weight scales and bias

template <typename X, typename Table, typename Bias>
void Run(const Shape& shape, const Buffers& b, const Part& part) {
  const int64_t d = shape.head_dim;
  const int64_t half_dim = d / 2;
  const int64_t num_q = shape.num_q;
  const int64_t num_kv = shape.num_kv;
  const int64_t kv_width = num_kv * d;
  const int64_t hidden = num_q * d + 2 * kv_width;
  const int64_t k_first = num_q;
  const int64_t v_first = num_q + num_kv;
  const int64_t rotated_end = part.head_end < v_first ? part.head_end : v_first;
  const bool shared = shape.SharesParameters();

  Token<X, Table, Bias> tokens[kTokensTogether];
  int64_t count = 0;
  for (int64_t first = part.token_begin; first < part.token_end; first += count) {
    const int64_t group = first / shape.tokens;
    const int64_t end = shared ? part.token_end : (group + 1) * shape.tokens;
    count = (end < part.token_end ? end : part.token_end) - first;
    const int64_t together = hidden > kNarrow ? kTokensTogether : 1;
    count = count < together ? count : together;
    const float* scale_k = b.scale_k + shape.ParameterBlock(kScaleK, group) * kv_width;
    const float* scale_v = b.scale_v + shape.ParameterBlock(kScaleV, group) * kv_width;
    const float* offset_k = Advance(b.offset_k, shape.ParameterBlock(kOffsetK, group) * kv_width);
    const float* offset_v = Advance(b.offset_v, shape.ParameterBlock(kOffsetV, group) * kv_width);

    for (int64_t i = 0; i < count; ++i) {
      Token<X, Table, Bias>& t = tokens[i];
      const int64_t token = first + i;
      t.in = {};
      t.in.x = static_cast<const X*>(b.x) + token * hidden;
      if constexpr (std::is_same_v<X, int32_t>) {
        t.in.weight_scale = b.weight_scale + shape.ParameterBlock(kWeightScale, group) * hidden;
        t.in.activation_scale = b.activation_scale == nullptr ? 1.0f : b.activation_scale[token];
        if constexpr (!std::is_same_v<Bias, NoBias>) {
          t.in.bias =
              static_cast<const Bias*>(b.bias) + shape.ParameterBlock(kBias, group) * hidden;
        }
      }
      t.cos = static_cast<const Table*>(b.cos) + token * d;
      t.sin = static_cast<const Table*>(b.sin) + token * d;
      t.q = static_cast<Table*>(b.q) + token * num_q * d;
      t.k = Advance(static_cast<Table*>(b.k), token * kv_width);
      t.v = Advance(static_cast<Table*>(b.v), token * kv_width);
      t.k_row = nullptr;
      t.v_row = nullptr;
      const int64_t slot = b.slots[token];
      if (slot >= 0 && slot < shape.rows) {
        const int64_t row = token / shape.tokens * shape.rows + slot;
        t.k_row = b.k_cache + row * kv_width;
        t.v_row = b.v_cache + row * kv_width;
        // Rows lie anywhere in a large cache: ask for them while the q heads are computed.
        PrefetchRow(t.k_row, kv_width);
        PrefetchRow(t.v_row, kv_width);
      }
    }

    for (int64_t column = 0; column < half_dim && part.head_begin < v_first;
         column += Angles::kMax) {
      for (int64_t i = 0; i < count; ++i) {
        Angles& angles = tokens[i].angles;
        angles.first = column;
        angles.count = half_dim - column < Angles::kMax ? half_dim - column : Angles::kMax;
        int64_t j = angles.Fill<kLanes>(tokens[i].cos, tokens[i].sin, half_dim, 0);
        j = angles.Fill<4>(tokens[i].cos, tokens[i].sin, half_dim, j);
        angles.Fill<1>(tokens[i].cos, tokens[i].sin, half_dim, j);
      }
      for (int64_t head = part.head_begin; head < rotated_end; ++head) {
        for (int64_t i = 0; i < count; ++i) {
          const Token<X, Table, Bias>& t = tokens[i];
          if (head < k_first) {
            RotateHead<false>(t.in, head * d, half_dim, t.angles, t.q + head * d, Quantizer{});
          } else {
            const int64_t at = (head - k_first) * d;
            const Quantizer quantizer = {scale_k + at, Advance(offset_k, at), Advance(t.k_row, at)};
            RotateHead<true>(t.in, head * d, half_dim, t.angles, Advance(t.k, at), quantizer);
          }
        }
      }
    }
    for (int64_t head = part.head_begin > v_first ? part.head_begin : v_first; head < part.head_end;
         ++head) {
      const int64_t at = (head - v_first) * d;
      for (int64_t i = 0; i < count; ++i) {
        const Token<X, Table, Bias>& t = tokens[i];
        const Quantizer quantizer = {scale_v + at, Advance(offset_v, at), Advance(t.v_row, at)};
        CopyHead(t.in, head * d, d, Advance(t.v, at), quantizer);
      }
    }
  }
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
