// Owns the arithmetic of N columns of a row, in registers: dequantise, rotate, quantise. It is
// compiled once per instruction set and in the unnamed namespace, for the reason that simd_types.h
// gives.
#ifndef JAX_KVCACHE_FFI_CPU_DEQUANT_ROPE_QUANT_KVCACHE_KERNEL_STAGES_H_
#define JAX_KVCACHE_FFI_CPU_DEQUANT_ROPE_QUANT_KVCACHE_KERNEL_STAGES_H_

#include <cstdint>
#include <type_traits>

#include "cpu/simd.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {
namespace {

struct NoBias {};  // in place of the bias's element type

// Turns N columns of x into float32 values. It is the same for all tokens of a group. An int32 x is
// the accumulator of an int8 matrix product; any other x is loaded as it is.
template <int N, typename X, typename Bias>
struct Dequantizer {
  static constexpr bool kXIsAccumulator = std::is_same_v<X, int32_t>;
  static constexpr bool kHasInt32Bias = std::is_same_v<Bias, int32_t>;
  static constexpr bool kHasFloatBias = !kHasInt32Bias && !std::is_same_v<Bias, NoBias>;

  Floats<N> weight_scale;
  std::conditional_t<kHasInt32Bias, UInts<N>, Floats<N>> bias;

  // Both pointers are at the first of the columns; they are not read unless x is an accumulator.
  JAX_KVCACHE_INLINE Dequantizer(const float* weight_scale_in, const Bias* bias_in) {
    if constexpr (kXIsAccumulator) {
      weight_scale = Load<N>(weight_scale_in);
      if constexpr (kHasInt32Bias) {
        bias = LoadBits<UInts<N>>(bias_in);
      } else if constexpr (kHasFloatBias) {
        bias = Load<N>(bias_in);
      }
    }
  }

  // `activation_scale` is 1 if the call has none: multiplying by 1 is exact.
  JAX_KVCACHE_INLINE Floats<N> Value(const X* x, float activation_scale) const {
    if constexpr (!kXIsAccumulator) {
      return Load<N>(x);
    } else {
      Floats<N> y;
      if constexpr (kHasInt32Bias) {
        const UInts<N> sum = LoadBits<UInts<N>>(x) + bias;  // unsigned: it wraps
        y = __builtin_convertvector(BitCast<Ints<N>>(sum), Floats<N>);
      } else {
        y = Load<N>(x);
      }
      y = y * weight_scale;
      y = y * activation_scale;
      if constexpr (kHasFloatBias) y = y + bias;
      return y;
    }
  }
};

// Turns values of N columns into int8 codes. It is the same for all tokens of a group.
template <int N>
struct Quantizer {
  Floats<N> scale;
  Floats<N> offset;

  // `offset_in` may be null. Then 0 is added, which can only turn -0 into +0, and both have code 0.
  JAX_KVCACHE_INLINE Quantizer(const float* scale_in, const float* offset_in)
      : scale(Load<N>(scale_in)), offset(offset_in == nullptr ? Floats<N>{} : Load<N>(offset_in)) {}

  JAX_KVCACHE_INLINE void Put(Floats<N> value, int8_t* row) const {
    StoreCodes<N>(value / scale + offset, row);
  }
};

// Something for columns [j, j + N) of a head, and for columns [j + D/2, j + D/2 + N).
template <typename T>
struct Halves {
  T low;
  T high;
};

// The rotary tables of one token at columns [j, j + N) of both halves.
template <int N, typename Table>
struct Angles {
  Floats<N> low_cos;
  Floats<N> low_minus_sin;
  Floats<N> high_cos;
  Floats<N> high_sin;

  // With float16 tables, the rotation rounds every product and every sum to float16. Each is
  // computed in float32 and then rounded to float16, which gives the same bits: the product of two
  // float16 values is exact in float32, and for a sum, float32 has 24 >= 2*11 + 2 significant bits,
  // with which rounding twice gives the same result as rounding once.
  using Compute = std::conditional_t<std::is_same_v<Table, Half>, Half, float>;

  // Both pointers are at the first of the columns.
  JAX_KVCACHE_INLINE void Read(const Table* cos, const Table* sin, int64_t half_dim) {
    low_cos = Load<N>(cos);
    low_minus_sin = -Load<N>(sin);
    high_cos = Load<N>(cos + half_dim);
    high_sin = Load<N>(sin + half_dim);
  }

  // out[j] = x[j + D/2] * -sin[j] + x[j] * cos[j]
  // out[j + D/2] = x[j] * sin[j + D/2] + x[j + D/2] * cos[j + D/2]
  JAX_KVCACHE_INLINE Halves<Floats<N>> Rotate(const Halves<Floats<N>>& x) const {
    return {RoundTo<Compute, N>(x.high * low_minus_sin) + RoundTo<Compute, N>(x.low * low_cos),
            RoundTo<Compute, N>(x.low * high_sin) + RoundTo<Compute, N>(x.high * high_cos)};
  }
};

}  // namespace
}  // namespace jax_kvcache::dequant_rope_quant_kvcache

#endif  // JAX_KVCACHE_FFI_CPU_DEQUANT_ROPE_QUANT_KVCACHE_KERNEL_STAGES_H_
