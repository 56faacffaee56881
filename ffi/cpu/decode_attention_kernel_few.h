// Owns the two products over a block of rows for few query rows: codes are converted on their way
// to the registers, once for W query rows.
#ifndef JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_FEW_H_
#define JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_FEW_H_

#include <algorithm>
#include <cstdint>

#include "cpu/decode_attention_kernel_math.h"

namespace jax_kvcache::decode_attention {
namespace {

// Where the channels of a kv head are in a cache row. They are read as `slots` vectors, of which
// the last ends with the last channel: it repeats some channels of the one before, whose query
// values are 0 there.
struct Channels {
  int64_t first;
  int64_t count;  // at least kLanes
  int64_t slots;

  // The place of a slot's vector in the row.
  int64_t At(int64_t slot) const { return first + std::min(slot * kLanes, count - kLanes); }
};

// What is fetched ahead while a block is computed: for each of its rows, the address of one head's
// D codes of K and of V in the next block (see PieceWalk); or null.
struct Ahead {
  const int8_t* const* k = nullptr;
  const int8_t* const* v = nullptr;

  // Asks the processor for the codes that belong to one row. They go to the level-2 cache, since
  // those of a whole block may be more than level 1 holds.
  JAX_KVCACHE_INLINE void Fetch(int64_t row, int64_t bytes) const {
    for (int64_t i = 0; i < bytes; i += 64) {
      __builtin_prefetch(k[row] + i, /*rw=*/0, /*locality=*/2);
      __builtin_prefetch(v[row] + i, /*rw=*/0, /*locality=*/2);
    }
  }
};

template <bool kCentred>
JAX_KVCACHE_INLINE Vector LoadCentred(const int8_t* codes, const float* centre) {
  if constexpr (kCentred) {
    return LoadCodes(codes) - LoadVector(centre);
  } else {
    return LoadCodes(codes);
  }
}

// scores [count, W] = codes of `count` rows times packed [slots, W, kLanes]. The count is a
// multiple of kRowsTogether.
template <int W, bool kCentred>
void ScoreRows(const int8_t* const* rows, int64_t count, Channels channels, const float* packed,
               const float* centre, Ahead ahead, float* scores) {
  // As many sums as there are registers for, and as StoreSums can add together.
  constexpr int kSums = kLanes == 16 && W > 1 ? 16 : 8;
  constexpr int kRows = kSums / W;
  for (int64_t r = 0; r < count; r += kRows) {
    if (ahead.k != nullptr) {
      for (int i = 0; i < kRows; ++i) ahead.Fetch(r + i, channels.count);
    }
    const int8_t* row[kRows];
    for (int i = 0; i < kRows; ++i) row[i] = rows[r + i];
    Vector sums[kSums] = {};
    for (int64_t slot = 0; slot < channels.slots; ++slot) {
      const int64_t at = channels.At(slot);
      Vector queries[W];
      for (int j = 0; j < W; ++j) queries[j] = LoadVector(packed + (slot * W + j) * kLanes);
      for (int i = 0; i < kRows; ++i) {
        const Vector codes = LoadCentred<kCentred>(row[i] + at, centre + slot * kLanes);
        for (int j = 0; j < W; ++j) sums[i * W + j] += codes * queries[j];
      }
    }
    StoreSums(sums, scores + r * W);
  }
}

// sums [W, stride], N vectors of each from `slot` on: times factors [W], plus weights [count, W]
// times the codes of `count` rows. The rows of a block are added to each other first, so that the
// rounding errors grow with the number of blocks and not of rows.
template <int W, int N, bool kCentred>
JAX_KVCACHE_INLINE void AddSlots(const int8_t* const* rows, int64_t count, Channels channels,
                                 int64_t slot, const float* weights, const float* centre,
                                 const float* factors, float* sums, int64_t stride) {
  const int64_t at = channels.At(slot);
  Vector added[W][N] = {};
  for (int64_t r = 0; r < count; ++r) {
    Vector codes[N];
    for (int i = 0; i < N; ++i) {
      codes[i] = LoadCentred<kCentred>(rows[r] + at + i * kLanes, centre + (slot + i) * kLanes);
    }
    for (int j = 0; j < W; ++j) {
      const float weight = weights[r * W + j];
      for (int i = 0; i < N; ++i) added[j][i] += codes[i] * weight;
    }
  }
  for (int j = 0; j < W; ++j) {
    float* const to = sums + j * stride + slot * kLanes;
    for (int i = 0; i < N; ++i) {
      StoreVector(LoadVector(to + i * kLanes) * factors[j] + added[j][i], to + i * kLanes);
    }
  }
}

// The same for all slots.
template <int W, bool kCentred>
void AddRows(const int8_t* const* rows, int64_t count, Channels channels, const float* weights,
             const float* centre, const float* factors, float* sums, int64_t stride) {
  constexpr int kSums = kLanes == 16 ? 16 : 8;
  constexpr int kSlots = W == 1 ? 8 : kSums / W;
  int64_t slot = 0;
  for (; (slot + kSlots) * kLanes <= channels.count; slot += kSlots) {
    AddSlots<W, kSlots, kCentred>(rows, count, channels, slot, weights, centre, factors, sums,
                                  stride);
  }
  for (; slot < channels.slots; ++slot) {
    AddSlots<W, 1, kCentred>(rows, count, channels, slot, weights, centre, factors, sums, stride);
  }
}

}  // namespace
}  // namespace jax_kvcache::decode_attention

#endif  // JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_FEW_H_
