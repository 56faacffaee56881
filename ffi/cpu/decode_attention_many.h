// Owns the two products over a block of rows for many query rows: the block's codes are converted
// to float32 once, and both products are matrix multiplications by blocks of registers.
#ifndef JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_MANY_H_
#define JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_MANY_H_

#include <cstdint>

#include "cpu/decode_attention_few.h"
#include "cpu/decode_attention_math.h"

namespace jax_kvcache::decode_attention {
namespace {

// The register block of both products: so many values are multiplied with two vectors.
constexpr int kTileRows = kLanes == 16 ? 8 : 4;

// values [count, D]: the codes of `count` rows, less the centre.
template <bool kCentred>
void ConvertKeys(const int8_t* const* rows, int64_t count, Channels channels, const float* centre,
                 const int8_t* const* ahead, float* values) {
  for (int64_t r = 0; r < count; ++r) {
    if (ahead != nullptr) Prefetch(ahead[r], channels.count);
    for (int64_t slot = 0; slot < channels.slots; ++slot) {
      const int64_t at = channels.At(slot);
      StoreVector(LoadCentred<kCentred>(rows[r] + at, centre + slot * kLanes),
                  values + r * channels.count + at - channels.first);
    }
  }
}

// values [slots / 2, count, 2 * kLanes]; behind an odd number of slots the last one is repeated.
template <bool kCentred>
void ConvertValues(const int8_t* const* rows, int64_t count, Channels channels,
                   const float* centre, const int8_t* const* ahead, float* values) {
  for (int64_t r = 0; r < count; ++r) {
    if (ahead != nullptr) Prefetch(ahead[r], channels.count);
    for (int64_t i = 0; i < channels.slots + channels.slots % 2; ++i) {
      const int64_t slot = std::min(i, channels.slots - 1);
      StoreVector(LoadCentred<kCentred>(rows[r] + channels.At(slot), centre + slot * kLanes),
                  values + ((i / 2 * count + r) * 2 + i % 2) * kLanes);
    }
  }
}

// scores [count, N * kLanes] = keys [count, D] times packed [D, N * kLanes]; the count is a multiple
// of kRowsTogether.
template <int N>
void ScoreTile(const float* keys, int64_t count, int64_t head_dim, const float* packed,
               float* scores) {
  for (int64_t r = 0; r < count; r += kTileRows) {
    Vector sums[kTileRows][N] = {};
    const float* key = keys + r * head_dim;
    for (int64_t d = 0; d < head_dim; ++d) {
      Vector queries[N];
      for (int j = 0; j < N; ++j) queries[j] = LoadVector(packed + (d * N + j) * kLanes);
      for (int i = 0; i < kTileRows; ++i) {
        const float value = key[i * head_dim + d];
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

// accumulators [kTileRows, stride], the two vectors of one pair of slots: times factors
// [kTileRows], plus weights [count, width] times values [count, 2 * kLanes].
JAX_KVCACHE_INLINE void AddPair(const float* values, int64_t count, const float* weights,
                                int64_t width, const float* factors, float* accumulators,
                                int64_t stride) {
  Vector sums[kTileRows][2] = {};
  for (int64_t r = 0; r < count; ++r) {
    const Vector low = LoadVector(values + r * 2 * kLanes);
    const Vector high = LoadVector(values + r * 2 * kLanes + kLanes);
    for (int i = 0; i < kTileRows; ++i) {
      const float weight = weights[r * width + i];
      sums[i][0] += low * weight;
      sums[i][1] += high * weight;
    }
  }
  for (int i = 0; i < kTileRows; ++i) {
    float* const to = accumulators + i * stride;
    StoreVector(LoadVector(to) * factors[i] + sums[i][0], to);
    StoreVector(LoadVector(to + kLanes) * factors[i] + sums[i][1], to + kLanes);
  }
}

// The same for `queries` query rows, rounded up to kTileRows, and all slots.
inline void AddTile(const float* values, int64_t count, int64_t pairs, const float* weights,
                    int64_t width, int64_t queries, const float* factors, float* accumulators,
                    int64_t stride) {
  for (int64_t pair = 0; pair < pairs; ++pair) {
    for (int64_t i = 0; i < queries; i += kTileRows) {
      AddPair(values + pair * count * 2 * kLanes, count, weights + i, width, factors + i,
              accumulators + i * stride + pair * 2 * kLanes, stride);
    }
  }
}

}  // namespace
}  // namespace jax_kvcache::decode_attention

#endif  // JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_MANY_H_
