// Owns the arithmetic. Compiled once per instruction set; JAX_KVCACHE_VARIANT names the entry
// point.
#include "kernel_variant.h"

#include "simd.h"

namespace jax_kvcache {
namespace {

struct NoBias {};

// x and what makes float32 values of it, at the first column of one token.
template <typename X, typename Bias>
struct TokenInput {
  const X* x;                 // [H]
  const float* weight_scale;  // [H]
  const Bias* bias;           // [H]
  float activation_scale;     // 1 when absent: that product is exact

  template <int N>
  JAX_KVCACHE_INLINE Floats<N> Value(int64_t column) const {
    if constexpr (!std::is_same_v<X, int32_t>) {
      return Load<N>(x + column);
    } else {
      Floats<N> y;
      if constexpr (std::is_same_v<Bias, int32_t>) {
        const UInts<N> sum =
            LoadBits<UInts<N>>(x + column) + LoadBits<UInts<N>>(bias + column);  // wraps
        y = __builtin_convertvector(BitCast<Ints<N>>(sum), Floats<N>);
      } else {
        y = Load<N>(x + column);
      }
      y = y * Load<N>(weight_scale + column);
      y = y * activation_scale;
      if constexpr (!std::is_same_v<Bias, int32_t> && !std::is_same_v<Bias, NoBias>) {
        y = y + Load<N>(bias + column);
      }
      return y;
    }
  }
};

// Where quantised values go, at the first column of one head; `row` is null for a skipped token.
struct Quantizer {
  const float* scale;   // [D]
  const float* offset;  // [D], or null
  int8_t* row;          // [D], or null

  template <int N>
  JAX_KVCACHE_INLINE void Put(Floats<N> value, int64_t column) const {
    Floats<N> z = value / Load<N>(scale + column);
    if (offset != nullptr) z = z + Load<N>(offset + column);
    StoreCodes<N>(z, row + column);
  }
};

// The rotary tables of one token as float32, for columns [first, first + count) of each half: read
// once, used by every head. Four of these, of 512 bytes each, stay in the first-level cache.
struct Angles {
  static constexpr int64_t kMax = 128;
  alignas(64) float low_cos[kMax];
  alignas(64) float low_minus_sin[kMax];
  alignas(64) float high_cos[kMax];
  alignas(64) float high_sin[kMax];
  int64_t first;
  int64_t count;

  template <int N, typename Table>
  JAX_KVCACHE_INLINE int64_t Fill(const Table* cos, const Table* sin, int64_t half_dim,
                                  int64_t begin) {
    int64_t i = begin;
    for (; i + N <= count; i += N) {
      Store<N>(Load<N>(cos + first + i), low_cos + i);
      Store<N>(-Load<N>(sin + first + i), low_minus_sin + i);
      Store<N>(Load<N>(cos + first + i + half_dim), high_cos + i);
      Store<N>(Load<N>(sin + first + i + half_dim), high_sin + i);
    }
    return i;
  }
};

// One head of q or k: columns j and j + D/2 for j in the angles' columns from `begin` on, as far as
// N lanes at a time go. `in`, `out` and the quantizer are at the head's first column. Returns where
// it stopped.
template <int N, bool kQuantize, typename X, typename Table, typename Bias>
JAX_KVCACHE_INLINE int64_t Rotate(const TokenInput<X, Bias>& in, int64_t head_column,
                                  int64_t half_dim, const Angles& angles, Table* out,
                                  const Quantizer& quantizer, int64_t begin) {
  // float16 tables: the rotation is in float16, one rounding per product and sum. Each is computed
  // in float32 and rounded, which is the same: a product of two float16 is exact in float32, and a
  // sum has 24 >= 2*11 + 2 bits, enough for rounding twice to equal rounding once.
  using Compute = std::conditional_t<std::is_same_v<Table, Half>, Half, float>;
  int64_t i = begin;
  for (; i + N <= angles.count; i += N) {
    const int64_t j = angles.first + i;
    Floats<N> low = in.template Value<N>(head_column + j);
    Floats<N> high = in.template Value<N>(head_column + j + half_dim);
    if constexpr (std::is_same_v<X, int32_t>) {
      low = RoundTo<Compute, N>(low);
      high = RoundTo<Compute, N>(high);
    }
    // out[j] = (x[j+h] * -sin[j]) + (x[j] * cos[j])
    const Floats<N> low_sum = RoundTo<Compute, N>(high * Load<N>(angles.low_minus_sin + i)) +
                              RoundTo<Compute, N>(low * Load<N>(angles.low_cos + i));
    // out[j+h] = (x[j] * sin[j+h]) + (x[j+h] * cos[j+h])
    const Floats<N> high_sum = RoundTo<Compute, N>(low * Load<N>(angles.high_sin + i)) +
                               RoundTo<Compute, N>(high * Load<N>(angles.high_cos + i));
    if (!kQuantize || out != nullptr) {
      Store<N>(low_sum, out + j);
      Store<N>(high_sum, out + j + half_dim);
    }
    if constexpr (kQuantize) {
      if (quantizer.row != nullptr) {
        quantizer.Put<N>(RoundTo<Compute, N>(low_sum), j);
        quantizer.Put<N>(RoundTo<Compute, N>(high_sum), j + half_dim);
      }
    }
  }
  return i;
}

// Columns [begin, width) of one head of v, as far as N lanes at a time go. Returns where it
// stopped.
template <int N, typename X, typename Table, typename Bias>
JAX_KVCACHE_INLINE int64_t CopyValues(const TokenInput<X, Bias>& in, int64_t first_column,
                                      int64_t width, Table* out, const Quantizer& quantizer,
                                      int64_t begin) {
  int64_t j = begin;
  for (; j + N <= width; j += N) {
    const Floats<N> value = in.template Value<N>(first_column + j);
    if (out != nullptr) Store<N>(value, out + j);
    if (quantizer.row != nullptr) quantizer.Put<N>(value, j);
  }
  return j;
}

template <bool kQuantize, typename X, typename Table, typename Bias>
JAX_KVCACHE_INLINE void RotateHead(const TokenInput<X, Bias>& in, int64_t head_column,
                                   int64_t half_dim, const Angles& angles, Table* out,
                                   const Quantizer& quantizer) {
  int64_t i = 0;
  i = Rotate<kLanes, kQuantize>(in, head_column, half_dim, angles, out, quantizer, i);
  if (i == angles.count) return;
  i = Rotate<4, kQuantize>(in, head_column, half_dim, angles, out, quantizer, i);
  Rotate<1, kQuantize>(in, head_column, half_dim, angles, out, quantizer, i);
}

template <typename X, typename Table, typename Bias>
JAX_KVCACHE_INLINE void CopyHead(const TokenInput<X, Bias>& in, int64_t head_column, int64_t d,
                                 Table* out, const Quantizer& quantizer) {
  int64_t j = CopyValues<kLanes>(in, head_column, d, out, quantizer, 0);
  if (j == d) return;
  j = CopyValues<4>(in, head_column, d, out, quantizer, j);
  CopyValues<1>(in, head_column, d, out, quantizer, j);
}

// Asks for `count` elements to be read (0) or written (1) a little later.
template <int kWrite, typename T>
JAX_KVCACHE_INLINE void Prefetch(const T* from, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(from);
  for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += 64) {
    __builtin_prefetch(bytes + i, kWrite, /*locality=*/2);
  }
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
        Prefetch<1>(t.k_row, kv_width);
        Prefetch<1>(t.v_row, kv_width);
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
          if (first + i + count < part.token_end) {
            // The same head of the tokens after these.
            Prefetch<0>(t.in.x + count * hidden + head * d, d);
            if (head < k_first) Prefetch<1>(t.q + (count * num_q + head) * d, d);
          }
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
