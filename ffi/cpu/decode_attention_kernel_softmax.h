// Owns the softmax of one block of rows, and what is kept of it from block to block.
#ifndef JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_SOFTMAX_H_
#define JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_SOFTMAX_H_

#include <cstdint>

#include "cpu/decode_attention_kernel_math.h"

namespace jax_kvcache::decode_attention {
namespace {

// A tile has W query rows, and scores [rows, W] that are read as vectors. W is 1, 2, 4, 8, kLanes
// or 2 * kLanes, so that lane i of vector n holds query (n * kLanes + i) % W. All that follows is
// kept per lane, in one vector or two.
constexpr int kMaxTileWidth = 2 * kLanes;

// What is known of a tile's query rows. Scores have been multiplied by log2(e), so that the weight
// e^(s - p) of a plain score s is 2^(score - peak).
struct TileState {
  float peak[kMaxTileWidth];   // the greatest score so far; -infinity: no row was seen
  float total[kMaxTileWidth];  // the sum of weights over the rows that this lane held
  // What the scores lack because codes lose their centre instead of the offset: the same for all
  // rows, so that it is added only where softmax does not remove it.
  float constant[kMaxTileWidth];
};

// How a block's scores are changed before the softmax.
struct ScoreRule {
  // A lane's query sees rows [begin, end) of the block, and no others; null: all rows.
  const int32_t* seen_begin = nullptr;  // [kMaxTileWidth]
  const int32_t* seen_end = nullptr;
  // With a soft cap, also multiplied by log2(e): the score becomes
  // cap * tanh((score + constant) * ln(2) / 2).
  float cap = 0.0f;
};

// The greatest of the lanes that hold the same query, in each of them.
JAX_KVCACHE_INLINE Vector GreatestOfQuery(Vector v, int64_t width) {
  if (width >= kLanes) return v;
  float lanes[kLanes];
  StoreVector(v, lanes);
  for (int64_t i = kLanes - 1; i >= width; --i) {
    lanes[i - width] = lanes[i] > lanes[i - width] ? lanes[i] : lanes[i - width];
  }
  for (int64_t i = width; i < kLanes; ++i) lanes[i] = lanes[i - width];
  return LoadVector(lanes);
}

// scores [rows, width] become weights; rows behind the last have the score -infinity. factors
// [kMaxTileWidth]: what the sums over the blocks before are to be multiplied with. kColumns: the
// vectors that one row fills, at least 1.
template <int kColumns>
void Softmax(float* scores, int64_t rows, int64_t width, const ScoreRule& rule, TileState* state,
             float* factors) {
  const int64_t vectors = rows * width / kLanes;
  // A query that sees a row has a finite peak, even if all its scores are NaN or -infinity.
  Vector peaks[kColumns];
  for (int c = 0; c < kColumns; ++c) {
    peaks[c] = Vector{} - FLT_MAX;
    if (rule.seen_begin == nullptr) continue;
    const auto begin = LoadBits<Ints<kLanes>>(rule.seen_begin + c * kLanes);
    const auto end = LoadBits<Ints<kLanes>>(rule.seen_end + c * kLanes);
    peaks[c] = begin < end ? peaks[c] : Vector{} - kInfinity;
  }
  if (rule.seen_begin == nullptr && rule.cap == 0.0f) {
    for (int64_t n = 0; n < vectors; n += kColumns) {
      for (int c = 0; c < kColumns; ++c) {
        peaks[c] = Greater(LoadVector(scores + (n + c) * kLanes), peaks[c]);
      }
    }
  } else {
    Ints<kLanes> lane_row;
    for (int i = 0; i < kLanes; ++i) lane_row[i] = static_cast<int32_t>(i / width);
    const int32_t rows_per_vector = width < kLanes ? static_cast<int32_t>(kLanes / width) : 1;
    for (int64_t n = 0; n < vectors; n += kColumns) {
      for (int c = 0; c < kColumns; ++c) {
        float* const at = scores + (n + c) * kLanes;
        Vector score = LoadVector(at);
        if (rule.cap != 0.0f) {
          const Vector tanh = TanhOfHalf(score + LoadVector(state->constant + c * kLanes));
          // What lies behind the last row is -infinity and stays so.
          score = score == Vector{} - kInfinity ? score : tanh * rule.cap;
        }
        if (rule.seen_begin != nullptr) {
          const auto begin = LoadBits<Ints<kLanes>>(rule.seen_begin + c * kLanes);
          const auto end = LoadBits<Ints<kLanes>>(rule.seen_end + c * kLanes);
          score = (lane_row >= begin) & (lane_row < end) ? score : Vector{} - kInfinity;
        }
        StoreVector(score, at);
        peaks[c] = Greater(score, peaks[c]);
      }
      lane_row += rows_per_vector;
    }
  }
  Vector sums[kColumns] = {};
  for (int c = 0; c < kColumns; ++c) {
    const Vector before = LoadVector(state->peak + c * kLanes);
    Vector peak = Greater(GreatestOfQuery(peaks[c], width), before);
    StoreVector(peak, state->peak + c * kLanes);
    // The difference of two infinities is NaN.
    peaks[c] = Greater(peak, Vector{} - FLT_MAX);
    StoreVector(Exp2(before - peaks[c]), factors + c * kLanes);
  }
  for (int64_t n = 0; n < vectors; n += kColumns) {
    for (int c = 0; c < kColumns; ++c) {
      float* const at = scores + (n + c) * kLanes;
      const Vector weight = Exp2(LoadVector(at) - peaks[c]);
      StoreVector(weight, at);
      sums[c] += weight;
    }
  }
  for (int c = 0; c < kColumns; ++c) {
    const Vector before = LoadVector(state->total + c * kLanes);
    StoreVector(before * LoadVector(factors + c * kLanes) + sums[c], state->total + c * kLanes);
  }
}

}  // namespace
}  // namespace jax_kvcache::decode_attention

#endif  // JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_SOFTMAX_H_
