// Owns the two products over a block of rows for few query rows: codes are converted on their way to
// the registers, once for W query rows.
//
// A row's channels are read as `slots` vectors. The last of them ends with the row: it repeats some
// channels of the one before, whose query values are 0 there.
#ifndef JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_FEW_H_
#define JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_FEW_H_

#include <algorithm>
#include <cstdint>

#include "cpu/decode_attention_math.h"

namespace jax_kvcache::decode_attention {
namespace {

// Where the channels of a kv head are.
struct Channels {
  int64_t first;  // of the head, in a cache row
  int64_t count;  // D, at least kLanes
  int64_t slots;  // vectors

  int64_t At(int64_t slot) const { return first + std::min(slot * kLanes, count - kLanes); }
};

template <bool kCentred>
JAX_KVCACHE_INLINE Vector LoadCentred(const int8_t* codes, const float* centre) {
  if constexpr (kCentred) return LoadCodes(codes) - LoadVector(centre);
  return LoadCodes(codes);
}

// Asks for what another block's head has in one row.
JAX_KVCACHE_INLINE void Prefetch(const int8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// scores [count, W] = codes of `count` rows times packed [slots, W, kLanes]; the count is a multiple
// of kRowsTogether. `ahead`: pieces of rows to ask for meanwhile, one per row, or null.
template <int W, bool kCentred>
void ScoreRows(const int8_t* const* rows, int64_t count, Channels channels, const float* packed,
               const float* centre, const int8_t* const* ahead, float* scores) {
  constexpr int kSums = kLanes == 16 && W > 1 ? 16 : 8;
  constexpr int kRows = kSums / W;
  for (int64_t r = 0; r < count; r += kRows) {
    if (ahead != nullptr) {
      for (int i = 0; i < kRows; ++i) Prefetch(ahead[r + i], channels.count);
    }
    const int8_t* row[kRows];
    for (int i = 0; i < kRows; ++i) row[i] = rows[r + i];
    Vector sums[kSums] = {};
    const float* q = packed;
    for (int64_t slot = 0; slot < channels.slots; ++slot) {
      const int64_t at = channels.At(slot);
      Vector queries[W];
      for (int j = 0; j < W; ++j) queries[j] = LoadVector(q + j * kLanes);
      for (int i = 0; i < kRows; ++i) {
        const Vector codes = LoadCentred<kCentred>(row[i] + at, centre + slot * kLanes);
        for (int j = 0; j < W; ++j) sums[i * W + j] += codes * queries[j];
      }
      q += W * kLanes;
    }
    StoreSums(sums, scores + r * W);
  }
}

// accumulators [W, stride] at `slot` and on, N vectors: times factors [W], plus weights [count, W]
// times the codes of `count` rows. The rows are summed first, so that rounding errors do not grow
// with the number of rows before.
template <int W, int N, bool kCentred>
JAX_KVCACHE_INLINE void AddSlots(const int8_t* const* rows, int64_t count, Channels channels,
                                 int64_t slot, const float* weights, const float* centre,
                                 const float* factors, float* accumulators, int64_t stride) {
  const int64_t at = channels.At(slot);
  Vector sums[W][N] = {};
  for (int64_t r = 0; r < count; ++r) {
    Vector codes[N];
    for (int i = 0; i < N; ++i) {
      codes[i] =
          LoadCentred<kCentred>(rows[r] + at + i * kLanes, centre + (slot + i) * kLanes);
    }
    for (int j = 0; j < W; ++j) {
      const float weight = weights[r * W + j];
      for (int i = 0; i < N; ++i) sums[j][i] += codes[i] * weight;
    }
  }
  for (int j = 0; j < W; ++j) {
    float* const to = accumulators + j * stride + slot * kLanes;
    for (int i = 0; i < N; ++i) {
      StoreVector(LoadVector(to + i * kLanes) * factors[j] + sums[j][i], to + i * kLanes);
    }
  }
}

template <int W, bool kCentred>
void AddRows(const int8_t* const* rows, int64_t count, Channels channels, const float* weights,
             const float* centre, const float* factors, float* accumulators, int64_t stride) {
  // As many accumulators as there are registers for.
  constexpr int kSlots = W == 1 ? 8 : W == 2 || kLanes == 16 ? 4 : 2;
  int64_t slot = 0;
  for (; (slot + kSlots) * kLanes <= channels.count; slot += kSlots) {
    AddSlots<W, kSlots, kCentred>(rows, count, channels, slot, weights, centre, factors,
                                  accumulators, stride);
  }
  for (; slot < channels.slots; ++slot) {
    AddSlots<W, 1, kCentred>(rows, count, channels, slot, weights, centre, factors, accumulators,
                             stride);
  }
}

}  // namespace
}  // namespace jax_kvcache::decode_attention

#endif  // JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_FEW_H_
