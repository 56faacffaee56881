// Owns how a softmax ends: partial results of several warps or blocks as one, and one as values of
// `out` and `lse`.
#ifndef JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_FINISH_H_
#define JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_FINISH_H_

#include <cstdint>

#include "cuda/decode_attention_walk.h"

namespace jax_kvcache::decode_attention::cuda {

using jax_kvcache::cuda::BFloat;
using jax_kvcache::cuda::LoadPack;

inline constexpr float kLn2 = 0.6931471805599453f;

// Some columns of the partial results of a query row, as they are added up. First all of them go
// through See, then all through Add. A partial result whose total is 0 saw no row, and its sums are
// 0.
template <int N>
struct Merged {
  float peak = -kInfinity;
  float total = 0.0f;
  Pack<float, N> sums = {};

  JAX_KVCACHE_DEVICE void See(float part_peak, float part_total) {
    if (part_total != 0.0f) peak = fmaxf(peak, part_peak);
  }
  JAX_KVCACHE_DEVICE void Add(float part_peak, float part_total, const Pack<float, N>& part_sums) {
    float factor = part_peak == peak ? 1.0f : Exp2(part_peak - peak);
    if (part_total == 0.0f) factor = 0.0f;  // both peaks may be -infinity
    total += part_total * factor;
    JAX_KVCACHE_UNROLL
    for (int i = 0; i < N; ++i) sums.at[i] += part_sums.at[i] * factor;
  }
};

// Where columns `column` to `column + N - 1` of a query row of `out` are written, and with column 0
// its `lse`. What that needs is read when this is made, long before it is used.
template <int N>
class Output {
 public:
  JAX_KVCACHE_DEVICE Output(const Arguments& a, uint32_t group, int64_t query, uint32_t q_head,
                            uint32_t column)
      : a_(a), row_(query * a.shape.num_q_heads + q_head), column_(column) {
    const Shape& shape = a.shape;
    const int64_t size = shape.num_kv_heads * shape.head_dim;
    const int64_t at = q_head / a.queries_per_head * shape.head_dim + column;
    const float* const scale = OfGroup(a, a.scale_v, kScaleV, group, size);
    const float* const offset = OfGroup(a, a.offset_v, kOffsetV, group, size);
    scale_ = LoadPack<N>(scale + at);
    if (offset != nullptr) offset_ = LoadPack<N>(offset + at);
    if (a.sinks != nullptr) sink_ = OfGroup(a, a.sinks, kSinks, group, shape.num_q_heads)[q_head];
  }

  // `bias`: what K's offset adds to every score.
  JAX_KVCACHE_DEVICE void Write(const Merged<N>& m, float bias) const {
    const bool seen = m.total != 0.0f;  // also if it is NaN
    if (a_.lse != nullptr && column_ == 0) {
      a_.lse[row_] =
          seen ? (m.peak + (log2f(m.total) - kWeightExponent)) * kLn2 + bias : -kInfinity;
    }
    float total = m.total;
    if (a_.sinks != nullptr) total += Exp2((sink_ - bias) * kLog2E - m.peak + kWeightExponent);
    Pack<float, N> values;
    JAX_KVCACHE_UNROLL
    for (int i = 0; i < N; ++i) {
      const float sum = m.sums.at[i] - offset_.at[i] * m.total;
      values.at[i] = seen ? sum / total * scale_.at[i] : 0.0f;
    }
    const int64_t to = row_ * a_.shape.head_dim + column_;
    if (a_.shape.q_dtype == DType::kF16) {
      StoreAs<Half>(values, to);
    } else if (a_.shape.q_dtype == DType::kBF16) {
      StoreAs<BFloat>(values, to);
    } else {
      StoreAs<float>(values, to);
    }
  }

 private:
  template <typename T>
  JAX_KVCACHE_DEVICE void StoreAs(const Pack<float, N>& values, int64_t to) const {
    Pack<T, N> rounded;
    JAX_KVCACHE_UNROLL
    for (int i = 0; i < N; ++i) rounded.at[i] = jax_kvcache::cuda::RoundTo<T>(values.at[i]);
    jax_kvcache::cuda::StorePack<N>(rounded, static_cast<T*>(a_.out) + to);
  }

  const Arguments& a_;
  const int64_t row_;  // of q
  const uint32_t column_;
  Pack<float, N> scale_;
  Pack<float, N> offset_ = {};
  float sink_ = 0.0f;
};

// Columns of a query row that a thread adds up.
inline constexpr int kMergedColumns = 4;

// Splits whose partial results a thread of the merging kernel reads at a time.
inline constexpr int kMergedSplits = 8;

// How many threads the merging kernel has.
inline int64_t MergingThreads(const Shape& shape) {
  const int64_t rows = shape.groups.count * shape.sequences * shape.queries * shape.num_q_heads;
  return rows * (shape.head_dim / kMergedColumns);
}

// What thread `index` of the merging kernel does.
JAX_KVCACHE_DEVICE void MergeSplits(const Arguments& a, uint32_t index) {
  const auto head_dim = static_cast<uint32_t>(a.shape.head_dim);
  const uint32_t threads_per_row = head_dim / kMergedColumns;
  const uint32_t row = index / threads_per_row;
  const uint32_t column = (index - row * threads_per_row) * kMergedColumns;
  const uint32_t q_heads = a.kv_heads * a.queries_per_head;
  const uint32_t query = row / q_heads;
  const uint32_t group = query / (a.sequences * static_cast<uint32_t>(a.shape.queries));
  if (group >= a.shape.groups.count) return;
  const uint32_t width = head_dim + kExtras;
  const Output<kMergedColumns> output(a, group, query, row - query * q_heads, column);
  const float* part = a.partials + int64_t{row} * a.splits * width;
  const float bias = part[head_dim + 2];
  Merged<kMergedColumns> merged;
  for (uint32_t begin = 0; begin < a.splits; begin += kMergedSplits) {
    Pack<float, kMergedColumns> sums[kMergedSplits];
    Pack<float, kExtras> extras[kMergedSplits];
    JAX_KVCACHE_UNROLL
    for (uint32_t i = 0; i < kMergedSplits; ++i, part += width) {
      sums[i] = {};
      extras[i] = {};
      if (begin + i >= a.splits) continue;
      sums[i] = LoadPack<kMergedColumns>(part + column);
      extras[i] = LoadPack<kExtras>(part + head_dim);
    }
    Merged<kMergedColumns> more;
    more.See(merged.peak, merged.total);
    JAX_KVCACHE_UNROLL
    for (int i = 0; i < kMergedSplits; ++i) more.See(extras[i].at[0], extras[i].at[1]);
    more.Add(merged.peak, merged.total, merged.sums);
    JAX_KVCACHE_UNROLL
    for (int i = 0; i < kMergedSplits; ++i) {
      more.Add(extras[i].at[0], extras[i].at[1], sums[i]);
    }
    merged = more;
  }
  output.Write(merged, bias);
}

}  // namespace jax_kvcache::decode_attention::cuda

#endif  // JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_FINISH_H_
