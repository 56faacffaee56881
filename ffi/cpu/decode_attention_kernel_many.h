// Owns the two products over a block of rows for many query rows: the block's codes are converted
// to float32 once, and both products are matrix multiplications in blocks of registers.
#ifndef JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_MANY_H_
#define JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_MANY_H_

#include <algorithm>
#include <cstdint>

#include "cpu/decode_attention_kernel_few.h"
#include "cpu/decode_attention_kernel_math.h"

namespace jax_kvcache::decode_attention {
namespace {

// A block of registers in both products: so many values times two vectors.
constexpr int kTileRows = kLanes == 16 ? 8 : 4;

// keys [count, D]: the codes of `count` rows, less the centre.
template <bool kCentred>
void ConvertKeys(const int8_t* const* rows, int64_t count, Channels channels, const float* centre,
                 Ahead ahead, float* keys) {
  for (int64_t r = 0; r < count; ++r) {
    if (ahead.k != nullptr) ahead.Fetch(r, channels.count);
    for (int64_t slot = 0; slot < channels.slots; ++slot) {
      const int64_t at = channels.At(slot);
      StoreVector(LoadCentred<kCentred>(rows[r] + at, centre + slot * kLanes),
                  keys + r * channels.count + at - channels.first);
    }
  }
}

// values [pairs, count, 2, kLanes]: the same by pairs of slots. An odd last slot is paired with
// itself.
template <bool kCentred>
void ConvertValues(const int8_t* const* rows, int64_t count, Channels channels, const float* centre,
                   float* values) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t i = 0; i < channels.slots + channels.slots % 2; ++i) {
      const int64_t slot = std::min(i, channels.slots - 1);
      StoreVector(LoadCentred<kCentred>(rows[r] + channels.At(slot), centre + slot * kLanes),
                  values + ((i / 2 * count + r) * 2 + i % 2) * kLanes);
    }
  }
}

// scores [count, N * kLanes] = keys [count, D] times packed [D, N * kLanes]. The count is a
// multiple of kRowsTogether.
template <int N>
void ScoreTile(const float* keys, int64_t count, int64_t head_dim, const float* packed,
               float* scores) {
  for (int64_t r = 0; r < count; r += kTileRows) {
    Vector sums[kTileRows][N] = {};
    const float* const key = keys + r * head_dim;
    for (int64_t c = 0; c < head_dim; ++c) {
      Vector queries[N];
      for (int j = 0; j < N; ++j) queries[j] = LoadVector(packed + (c * N + j) * kLanes);
      for (int i = 0; i < kTileRows; ++i) {
        const float value = key[i * head_dim + c];
        for (int j = 0; j < N; ++j) sums[i][j] += queries[j] * value;
      }
    }
    for (int i = 0; i < kTileRows; ++i) {
      for (int j = 0; j < N; ++j) {
        StoreVector(sums[i][j], scores + ((r + i) * N + j) * kLanes);
      }
    }
  }
}

// sums [kTileRows, stride], two vectors of each: times factors [kTileRows], plus weights [count,
// width] times values [count, 2, kLanes].
JAX_KVCACHE_INLINE void AddPair(const float* values, int64_t count, const float* weights,
                                int64_t width, const float* factors, float* sums, int64_t stride) {
  Vector added[kTileRows][2] = {};
  for (int64_t r = 0; r < count; ++r) {
    const Vector low = LoadVector(values + r * 2 * kLanes);
    const Vector high = LoadVector(values + r * 2 * kLanes + kLanes);
    for (int i = 0; i < kTileRows; ++i) {
      const float weight = weights[r * width + i];
      added[i][0] += low * weight;
      added[i][1] += high * weight;
    }
  }
  for (int i = 0; i < kTileRows; ++i) {
    float* const to = sums + i * stride;
    StoreVector(LoadVector(to) * factors[i] + added[i][0], to);
    StoreVector(LoadVector(to + kLanes) * factors[i] + added[i][1], to + kLanes);
  }
}

// The same for all pairs of slots and for `queries` query rows, rounded up to kTileRows.
inline void AddTile(const float* values, int64_t count, int64_t pairs, const float* weights,
                    int64_t width, int64_t queries, const float* factors, float* sums,
                    int64_t stride) {
  for (int64_t pair = 0; pair < pairs; ++pair) {
    for (int64_t i = 0; i < queries; i += kTileRows) {
      AddPair(values + pair * count * 2 * kLanes, count, weights + i, width, factors + i,
              sums + i * stride + pair * 2 * kLanes, stride);
    }
  }
}

}  // namespace
}  // namespace jax_kvcache::decode_attention

#endif  // JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_MANY_H_
