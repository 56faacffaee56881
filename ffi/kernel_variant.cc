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

// Columns [begin, width) of v, as far as N lanes at a time go. Returns where it stopped.
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

JAX_KVCACHE_INLINE void PrefetchRow(const int8_t* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, /*rw=*/1);
}

template <typename T>
JAX_KVCACHE_INLINE T* Advance(T* pointer, int64_t count) {
  return pointer == nullptr ? nullptr : pointer + count;
}

template <typename X, typename Table, typename Bias>
void Run(const Shape& shape, const Buffers& b, const Part& part) {
  const int64_t d = shape.head_dim;
  const int64_t half_dim = d / 2;
  const int64_t num_q = shape.num_q;
  const int64_t num_kv = shape.num_kv;
  const int64_t kv_width = num_kv * d;
  const int64_t hidden = num_q * d + 2 * kv_width;
  const int64_t q_end = part.head_end < num_q ? part.head_end : num_q;
  const int64_t k_begin = part.head_begin > num_q ? part.head_begin - num_q : 0;
  const int64_t k_end = part.head_end - num_q < num_kv ? part.head_end - num_q : num_kv;
  const int64_t v_first = num_q + num_kv;
  const int64_t v_begin = part.head_begin > v_first ? part.head_begin - v_first : 0;
  const int64_t v_end = part.head_end - v_first;

  // The cache row of a flat token, or -1. The group is where the token's row may be at all.
  const auto row_of = [&](int64_t token) -> int64_t {
    const int64_t slot = b.slots[token];
    if (slot < 0 || slot >= shape.rows) return -1;
    return token / shape.tokens * shape.rows + slot;
  };

  int64_t group = -1;
  const float* scale_k = nullptr;
  const float* scale_v = nullptr;
  const float* offset_k = nullptr;
  const float* offset_v = nullptr;
  TokenInput<X, Bias> in = {};
  for (int64_t token = part.token_begin; token < part.token_end; ++token) {
    if (token / shape.tokens != group) {
      group = token / shape.tokens;
      scale_k = b.scale_k + shape.ParameterBlock(kScaleK, group) * kv_width;
      scale_v = b.scale_v + shape.ParameterBlock(kScaleV, group) * kv_width;
      offset_k = Advance(b.offset_k, shape.ParameterBlock(kOffsetK, group) * kv_width);
      offset_v = Advance(b.offset_v, shape.ParameterBlock(kOffsetV, group) * kv_width);
      if constexpr (std::is_same_v<X, int32_t>) {
        in.weight_scale = b.weight_scale + shape.ParameterBlock(kWeightScale, group) * hidden;
        if constexpr (!std::is_same_v<Bias, NoBias>) {
          in.bias = static_cast<const Bias*>(b.bias) + shape.ParameterBlock(kBias, group) * hidden;
        }
      }
    }
    const int64_t row = row_of(token);
    int8_t* k_row = row < 0 ? nullptr : b.k_cache + row * kv_width;
    int8_t* v_row = row < 0 ? nullptr : b.v_cache + row * kv_width;
    if (row >= 0) {
      // Rows lie anywhere in a large cache: ask for this token's while its q heads are computed.
      PrefetchRow(k_row, kv_width);
      PrefetchRow(v_row, kv_width);
    }
    in.x = static_cast<const X*>(b.x) + token * hidden;
    in.activation_scale = b.activation_scale == nullptr ? 1.0f : b.activation_scale[token];
    const Table* cos = static_cast<const Table*>(b.cos) + token * d;
    const Table* sin = static_cast<const Table*>(b.sin) + token * d;

    Table* q = static_cast<Table*>(b.q) + token * num_q * d;
    Table* k = Advance(static_cast<Table*>(b.k), token * kv_width);
    for (int64_t first = 0; first < half_dim && part.head_begin < v_first; first += Angles::kMax) {
      Angles angles;
      angles.first = first;
      angles.count = half_dim - first < Angles::kMax ? half_dim - first : Angles::kMax;
      int64_t i = angles.Fill<kLanes>(cos, sin, half_dim, 0);
      i = angles.Fill<4>(cos, sin, half_dim, i);
      angles.Fill<1>(cos, sin, half_dim, i);
      for (int64_t head = part.head_begin; head < q_end; ++head) {
        RotateHead<false>(in, head * d, half_dim, angles, q + head * d, Quantizer{});
      }
      for (int64_t head = k_begin; head < k_end; ++head) {
        const Quantizer quantizer = {scale_k + head * d, Advance(offset_k, head * d),
                                     Advance(k_row, head * d)};
        RotateHead<true>(in, (num_q + head) * d, half_dim, angles, Advance(k, head * d), quantizer);
      }
    }
    if (v_begin < v_end) {
      Table* v = Advance(static_cast<Table*>(b.v), token * kv_width);
      const Quantizer quantizer = {scale_v, offset_v, v_row};
      const int64_t column = v_first * d;
      int64_t j = v_begin * d;
      j = CopyValues<kLanes>(in, column, v_end * d, v, quantizer, j);
      j = CopyValues<4>(in, column, v_end * d, v, quantizer, j);
      CopyValues<1>(in, column, v_end * d, v, quantizer, j);
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
