// Owns the arithmetic of N columns, in registers: dequantise, rotate, quantise. Compiled once per
// instruction set, with what simd.h says about that.
#ifndef JAX_KVCACHE_FFI_STAGES_H_
#define JAX_KVCACHE_FFI_STAGES_H_

#include <cstdint>
#include <type_traits>

#include "simd.h"

namespace jax_kvcache {
namespace {

struct NoBias {};

// What makes float32 values of N columns of x, the same for every token of a group.
template <int N, typename X, typename Bias>
struct Dequantizer {
  using BiasVector = std::conditional_t<std::is_same_v<Bias, int32_t>, UInts<N>, Floats<N>>;
  Floats<N> weight_scale;
  BiasVector bias;

  // `weight_scale` and `bias` are at the first of the columns; unused where x is not int32.
  JAX_KVCACHE_INLINE Dequantizer(const float* weight_scale_in, const Bias* bias_in) {
    if constexpr (std::is_same_v<X, int32_t>) {
      weight_scale = Load<N>(weight_scale_in);
      if constexpr (std::is_same_v<Bias, int32_t>) {
        bias = LoadBits<UInts<N>>(bias_in);
      } else if constexpr (!std::is_same_v<Bias, NoBias>) {
        bias = Load<N>(bias_in);
      }
    }
  }

  // `activation_scale` is 1 when absent: that product is exact.
  JAX_KVCACHE_INLINE Floats<N> Value(const X* x, float activation_scale) const {
    if constexpr (!std::is_same_v<X, int32_t>) {
      return Load<N>(x);
    } else {
      Floats<N> y;
      if constexpr (std::is_same_v<Bias, int32_t>) {
        const UInts<N> sum = LoadBits<UInts<N>>(x) + bias;  // wraps
        y = __builtin_convertvector(BitCast<Ints<N>>(sum), Floats<N>);
      } else {
        y = Load<N>(x);
      }
      y = y * weight_scale;
      y = y * activation_scale;
      if constexpr (!std::is_same_v<Bias, int32_t> && !std::is_same_v<Bias, NoBias>) y = y + bias;
      return y;
    }
  }
};

// What makes int8 codes of N columns, the same for every token of a group.
template <int N>
struct Quantizer {
  Floats<N> scale;
  Floats<N> offset;

  // `offset` may be null: adding 0 changes the sign of a zero, which has no code of its own.
  JAX_KVCACHE_INLINE Quantizer(const float* scale_in, const float* offset_in)
      : scale(Load<N>(scale_in)), offset(offset_in == nullptr ? Floats<N>{} : Load<N>(offset_in)) {}

  JAX_KVCACHE_INLINE void Put(Floats<N> value, int8_t* row) const {
    StoreCodes<N>(value / scale + offset, row);
  }
};

// Something of columns [j, j + N) of a head, and of columns [j + D/2, j + D/2 + N).
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

  // float16 tables: the rotation is in float16, one rounding per product and sum. Each is computed
  // in float32 and rounded, which is the same: a product of two float16 is exact in float32, and a
  // sum has 24 >= 2*11 + 2 bits, enough for rounding twice to equal rounding once.
  using Compute = std::conditional_t<std::is_same_v<Table, Half>, Half, float>;

  // `cos` and `sin` are at the first of the columns.
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
}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_STAGES_H_
