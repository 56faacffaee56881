// Owns the first phase of a block of decode_attention: q as factors of matrix products, and which
// cache rows each query row sees.
#ifndef JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_QUERIES_H_
#define JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_QUERIES_H_

#include <cstdint>

#include "cuda/decode_attention_geometry.h"
#include "cuda/decode_attention_place.h"
#include "cuda/warp.h"

namespace jax_kvcache::decode_attention::cuda {

using jax_kvcache::cuda::BitCast;
using jax_kvcache::cuda::EachLane;
using jax_kvcache::cuda::EachWarp;
using jax_kvcache::cuda::FragmentA;
using jax_kvcache::cuda::FragmentB;
using jax_kvcache::cuda::FragmentC;
using jax_kvcache::cuda::Half;
using jax_kvcache::cuda::kWarpLanes;
using jax_kvcache::cuda::Pack;
using jax_kvcache::cuda::PerLane;
using jax_kvcache::cuda::ToFloat;
using jax_kvcache::cuda::ToHalf;

inline constexpr float kInfinity = __builtin_huge_valf();
inline constexpr float kLog2E = 1.4426950408889634f;

// The largest of a row's numbers becomes less than 2 ** 14 by a power of two, so that none
// overflows float16 and their remainders, which are 2 ** -11 times as large, are normal numbers.
inline constexpr int kQueryExponent = 13;

// What the warps of a block share.
template <int D>
struct Shared {
  // Dead when the block's warps have been through their rows: `sums` takes its place.
  union {
    // q * scale_k * scale as factor A of each step: a float16 and the float16 nearest to the
    // remainder.
    alignas(16) uint32_t q[2][Geometry<D>::kSteps][kWarpLanes][4];
    float sums[kWarps][kTileRows / 2][D + 4];  // + 4: fewer bank conflicts
  };
  float factor[kTileRows];   // a score is this times the product of codes and factor A
  float bias[kTileRows];     // and this, that K's offset adds
  uint32_t low[kTileRows];   // the first and the last cache row that a query row sees;
  uint32_t high[kTileRows];  // low > high: it sees none
  float peak[kWarps][kTileRows];
  float total[kWarps][kTileRows];
};

// 2 ** exponent, for exponents from -126 to 127.
JAX_KVCACHE_DEVICE float PowerOfTwo(int exponent) {
  return BitCast<float>(static_cast<uint32_t>(127 + exponent) << 23);
}

// The exponent by which a row's numbers are divided to begin at 2 ** 13, from the largest of them.
// For infinity it is 0: the results are NaN, as they must be.
JAX_KVCACHE_DEVICE int ScaleExponent(float largest) {
  const int exponent = static_cast<int>(BitCast<uint32_t>(largest) >> 23 & 0xFFU) - 127;
  if (exponent == 128) return 0;
  return (exponent < -100 ? -100 : exponent) - kQueryExponent;
}

template <int D>
class Queries {
 public:
  using G = Geometry<D>;

  JAX_KVCACHE_DEVICE Queries(const Arguments& a, const Place& place, Shared<D>* shared)
      : a_(a), place_(place), shared_(*shared), num_rows_(place.NumQueryRows(a)) {
    const int64_t size = a.shape.num_kv_heads * D;
    const int64_t at = place.kv_head * D;
    scale_k_ = OfGroup(a, a.scale_k, kScaleK, place.group, size) + at;
    offset_k_ = OfGroup(a, a.offset_k, kOffsetK, place.group, size);
    if (offset_k_ != nullptr) offset_k_ += at;
  }

  // Writes which cache rows each query row sees, and zeros where no query row will be.
  JAX_KVCACHE_DEVICE void Begin() {
    EachWarp<kWarps>([&](int warp) {
      EachLane([&](int lane) {
        const int thread = warp * kWarpLanes + lane;
        if (thread < kTileRows) FindRows(thread);
        if (num_rows_ < kTileRows) ClearFactors(thread);
      });
    });
  }

  // Writes the query rows as factors; each warp prepares some of them. All of its numbers are on
  // their way before it uses the first one.
  JAX_KVCACHE_DEVICE void Prepare(int warp) {
    PerLane<Columns> rows[kRowsOfWarp];
    PerLane<Columns> scale;
    PerLane<Columns> offset;
    EachLane([&](int lane) {
      JAX_KVCACHE_UNROLL
      for (int i = 0; i < kPerLane; ++i) {
        const int column = lane + i * kWarpLanes;
        const bool exists = D % kWarpLanes == 0 || column < D;
        scale[lane].at[i] = exists ? scale_k_[column] : 0.0f;
        offset[lane].at[i] = exists && offset_k_ != nullptr ? offset_k_[column] : 0.0f;
      }
    });
    switch (a_.shape.q_dtype) {
      case DType::kF16:
        Load<Half>(warp, rows);
        break;
      case DType::kBF16:
        Load<jax_kvcache::cuda::BFloat>(warp, rows);
        break;
      default:
        Load<float>(warp, rows);
    }
    JAX_KVCACHE_UNROLL
    for (int r = 0; r < kRowsOfWarp; ++r) {
      if (r * kWarps + warp < num_rows_) PrepareRow(r * kWarps + warp, rows[r], scale, offset);
    }
  }

 private:
  static constexpr int kRowsOfWarp = kTileRows / kWarps;
  static constexpr int kPerLane = (D + kWarpLanes - 1) / kWarpLanes;  // columns
  struct Columns {
    float at[kPerLane];
  };

  // The factors of rows that do not exist stay zeros.
  JAX_KVCACHE_DEVICE void ClearFactors(int thread) {
    uint32_t* const words = &shared_.q[0][0][0][0];
    constexpr int kPacks = static_cast<int>(sizeof(shared_.q) / 16);
    for (int i = thread; i < kPacks; i += kWarps * kWarpLanes) {
      jax_kvcache::cuda::StorePack<4>(Pack<uint32_t, 4>{}, words + 4 * i);
    }
    if (thread < kTileRows) {
      shared_.factor[thread] = 0.0f;
      shared_.bias[thread] = 0.0f;
    }
  }

  template <typename T>
  JAX_KVCACHE_DEVICE void Load(int warp, PerLane<Columns> (&rows)[kRowsOfWarp]) const {
    JAX_KVCACHE_UNROLL
    for (int r = 0; r < kRowsOfWarp; ++r) {
      const int row = r * kWarps + warp;
      const Place::Query query = place_.At(a_, row);
      const T* const q =
          static_cast<const T*>(a_.q) + (query.query * a_.shape.num_q_heads + query.q_head) * D;
      EachLane([&](int lane) {
        JAX_KVCACHE_UNROLL
        for (int i = 0; i < kPerLane; ++i) {
          const int column = lane + i * kWarpLanes;
          T value{};
          if (row < num_rows_ && (D % kWarpLanes == 0 || column < D)) value = q[column];
          rows[r][lane].at[i] = ToFloat(value);
        }
      });
    }
  }

  // Writes factor A of a row, the scores' factor and their bias.
  JAX_KVCACHE_DEVICE void PrepareRow(int row, PerLane<Columns>& values,
                                     const PerLane<Columns>& scale,
                                     const PerLane<Columns>& offset) {
    PerLane<float> largest;
    PerLane<float> bias;
    EachLane([&](int lane) {
      largest[lane] = 0.0f;
      bias[lane] = 0.0f;
      JAX_KVCACHE_UNROLL
      for (int i = 0; i < kPerLane; ++i) {
        float& value = values[lane].at[i];
        value *= scale[lane].at[i] * a_.shape.scale;
        if (offset_k_ != nullptr) bias[lane] -= value * offset[lane].at[i];
        const float size = value < 0.0f ? -value : value;
        if (size > largest[lane]) largest[lane] = size;
      }
    });
    jax_kvcache::cuda::MaxOf<kWarpLanes>(&largest);
    if (offset_k_ != nullptr) jax_kvcache::cuda::SumOf<kWarpLanes>(&bias);
    EachLane([&](int lane) {
      const int exponent = ScaleExponent(largest[lane]);
      JAX_KVCACHE_UNROLL
      for (int i = 0; i < kPerLane; ++i) {
        const int column = lane + i * kWarpLanes;
        if (D % kWarpLanes == 0 || column < D) {
          StoreFactor(row, column, values[lane].at[i] * PowerOfTwo(-exponent));
        }
      }
      if (lane == 0) {
        shared_.factor[row] = PowerOfTwo(exponent);
        shared_.bias[row] = bias[lane];
      }
    });
  }

  // Puts one number where the lane that needs it finds it; the inverse of Geometry::KeyColumn.
  JAX_KVCACHE_DEVICE void StoreFactor(int row, int column, float value) {
    const int granule = column / G::kKeyBytes;
    const int byte = granule / 4 * G::kKeyBytes + column % G::kKeyBytes;  // of the lane's
    const int lane = row % 8 * 4 + granule % 4;
    const int word = row / 8 + byte % 4 / 2 * 2;
    const Half high = ToHalf(value);
    const Half low = ToHalf(value - ToFloat(high));
    StoreHalf(&shared_.q[0][byte / 4][lane][word], byte % 2, high);
    StoreHalf(&shared_.q[1][byte / 4][lane][word], byte % 2, low);
  }

  JAX_KVCACHE_DEVICE static void StoreHalf(uint32_t* word, int i, Half value) {
    memcpy(reinterpret_cast<char*>(word) + 2 * i, &value, sizeof(value));
  }

  // A row that does not exist sees everything, so that it is never the reason to mask a score.
  JAX_KVCACHE_DEVICE void FindRows(int row) {
    shared_.low[row] = 0;
    shared_.high[row] = UINT32_MAX;
    if (row >= num_rows_) return;
    const int64_t position = a_.positions[place_.At(a_, row).query];
    const int64_t capacity = a_.shape.table_blocks * a_.shape.block_rows;
    if (position < 0) {
      shared_.low[row] = 1;
      shared_.high[row] = 0;
      return;
    }
    const int64_t window = a_.shape.window;
    if (window > 0 && position >= window) {
      shared_.low[row] = static_cast<uint32_t>(position - window + 1);
    }
    shared_.high[row] = static_cast<uint32_t>(position < capacity ? position : capacity - 1);
  }

  const Arguments& a_;
  const Place& place_;
  Shared<D>& shared_;
  const int num_rows_;  // that exist
  const float* scale_k_;
  const float* offset_k_;
};

}  // namespace jax_kvcache::decode_attention::cuda

#endif  // JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_QUERIES_H_
