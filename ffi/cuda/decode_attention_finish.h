// Owns how a softmax ends: partial results of several warps or blocks as one, and one as values of
// `out` and `lse`.
#ifndef JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_FINISH_H_
#define JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_FINISH_H_

#include <cstdint>

#include "cuda/decode_attention_walk.h"

namespace jax_kvcache::decode_attention::cuda {

inline constexpr float kLn2 = 0.6931471805599453f;

// One column of the partial results of a query row, as they are added up. First all of them go
// through See, then all through Add. A partial result whose total is 0 saw no row; its sum may be
// anything.
struct Merged {
  float peak = -kInfinity;
  float total = 0.0f;
  float sum = 0.0f;

  JAX_KVCACHE_DEVICE void See(float part_peak, float part_total) {
    if (part_total != 0.0f) peak = fmaxf(peak, part_peak);
  }
  JAX_KVCACHE_DEVICE float FactorOf(float part_peak) const {
    return part_peak == peak ? 1.0f : Exp2(part_peak - peak);  // both may be -infinity
  }
  JAX_KVCACHE_DEVICE void Add(float part_peak, float part_total, float part_sum) {
    if (part_total == 0.0f) return;
    const float factor = FactorOf(part_peak);
    total += part_total * factor;
    sum += part_sum * factor;
  }
};

// Writes column `column` of a query row of `out`, and with column 0 its `lse`.
JAX_KVCACHE_DEVICE void Finish(const Arguments& a, int64_t group, int64_t query, int64_t q_head,
                               int64_t column, const Merged& m, float bias) {
  const Shape& shape = a.shape;
  const int64_t head_dim = shape.head_dim;
  const int64_t row = query * shape.num_q_heads + q_head;
  const bool seen = m.total != 0.0f;  // also if it is NaN
  if (a.lse != nullptr && column == 0) {
    a.lse[row] = seen ? (m.peak + (log2f(m.total) - kWeightExponent)) * kLn2 + bias : -kInfinity;
  }
  float value = 0.0f;
  if (seen) {
    const int64_t size = shape.num_kv_heads * head_dim;
    const int64_t at = q_head / (shape.num_q_heads / shape.num_kv_heads) * head_dim + column;
    float sum = m.sum;
    if (a.offset_v != nullptr) {
      sum -= OfGroup(a, a.offset_v, kOffsetV, group, size)[at] * m.total;
    }
    float total = m.total;
    if (a.sinks != nullptr) {
      const float sink = OfGroup(a, a.sinks, kSinks, group, shape.num_q_heads)[q_head];
      total += Exp2((sink - bias) * kLog2E - m.peak + kWeightExponent);
    }
    value = sum / total * OfGroup(a, a.scale_v, kScaleV, group, size)[at];
  }
  const int64_t to = row * head_dim + column;
  if (shape.q_dtype == DType::kF16) {
    static_cast<Half*>(a.out)[to] = ToHalf(value);
  } else if (shape.q_dtype == DType::kBF16) {
    static_cast<jax_kvcache::cuda::BFloat*>(a.out)[to] = jax_kvcache::cuda::ToBFloat(value);
  } else {
    static_cast<float*>(a.out)[to] = value;
  }
}

// What thread `index` of the merging kernel does: one column of one query row, over all splits.
JAX_KVCACHE_DEVICE void MergeSplits(const Arguments& a, int64_t index) {
  const Shape& shape = a.shape;
  const int64_t column = index % shape.head_dim;
  const int64_t row = index / shape.head_dim;
  const int64_t query = row / shape.num_q_heads;
  const int64_t group = query / (shape.sequences * shape.queries);
  if (group >= shape.groups.count) return;
  const int64_t width = shape.head_dim + kExtras;
  const float* const parts = a.partials + row * a.splits * width;
  Merged merged;
  for (int split = 0; split < a.splits; ++split) {
    const float* const extras = parts + split * width + shape.head_dim;
    merged.See(extras[0], extras[1]);
  }
  for (int split = 0; split < a.splits; ++split) {
    const float* const part = parts + split * width;
    merged.Add(part[shape.head_dim], part[shape.head_dim + 1], part[column]);
  }
  Finish(a, group, query, row % shape.num_q_heads, column, merged, parts[shape.head_dim + 2]);
}

}  // namespace jax_kvcache::decode_attention::cuda

#endif  // JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_FINISH_H_
