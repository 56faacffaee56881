// Owns the arithmetic of one head of one token: dequantise, rotate, quantise. Compiled once per
// instruction set, with what simd.h says about that.
#ifndef JAX_KVCACHE_FFI_STAGES_H_
#define JAX_KVCACHE_FFI_STAGES_H_

#include <cstdint>
#include <type_traits>

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

}  // namespace
}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_STAGES_H_
