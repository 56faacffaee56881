// Owns the warp's operations on the host, for the tests; warp.h explains them and includes this
// file.
#ifndef JAX_KVCACHE_FFI_CUDA_WARP_HOST_H_
#define JAX_KVCACHE_FFI_CUDA_WARP_HOST_H_

#include <algorithm>
#include <cmath>

namespace jax_kvcache::cuda {

template <typename T>
struct PerLane {
  T values[kWarpLanes];
  T& operator[](int lane) { return values[lane]; }
  const T& operator[](int lane) const { return values[lane]; }
};

template <typename Body>
void EachLane(const Body& body) {
  for (int lane = 0; lane < kWarpLanes; ++lane) body(lane);
}

template <typename T, int kWarps>
struct PerWarp {
  T values[kWarps];
  T& operator[](int warp) { return values[warp]; }
};

template <int kWarps, typename Body>
void EachWarp(const Body& body) {
  for (int warp = 0; warp < kWarps; ++warp) body(warp);
}

// All warps have ended what is before it when the next EachWarp begins.
inline void SyncBlock() {}

template <typename T, typename Source>
PerLane<T> Shuffle(const PerLane<T>& from, const Source& source) {
  PerLane<T> to;
  for (int lane = 0; lane < kWarpLanes; ++lane) to[lane] = from[source(lane)];
  return to;
}

inline uint32_t Ballot(const PerLane<bool>& value) {
  uint32_t bits = 0;
  for (int lane = 0; lane < kWarpLanes; ++lane) bits |= (value[lane] ? 1U : 0U) << lane;
  return bits;
}

template <int kLanes>
void MaxOf(PerLane<float>* value) {
  for (int mask = 1; mask < kLanes; mask *= 2) {
    const PerLane<float> old = *value;
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      (*value)[lane] = std::fmax(old[lane], old[lane ^ mask]);
    }
  }
}

template <int kLanes>
void SumOf(PerLane<float>* value) {
  for (int mask = 1; mask < kLanes; mask *= 2) {
    const PerLane<float> old = *value;
    for (int lane = 0; lane < kWarpLanes; ++lane) (*value)[lane] = old[lane] + old[lane ^ mask];
  }
}

inline uint32_t Smallest(const PerLane<uint32_t>& value) {
  return *std::min_element(value.values, value.values + kWarpLanes);
}
inline uint32_t Largest(const PerLane<uint32_t>& value) {
  return *std::max_element(value.values, value.values + kWarpLanes);
}

inline float HalfOfWord(uint32_t word, int i) {
  return ToFloat(Half{static_cast<uint16_t>(word >> 16 * i)});
}

// Tensor cores add exact products and drop the bits that float32 has no room for.
inline float RoundTowardZero(double value) {
  const auto rounded = static_cast<float>(value);
  return std::fabs(rounded) > std::fabs(value) ? std::nextafter(rounded, 0.0f) : rounded;
}

inline void Mma(PerLane<FragmentC>* c, const PerLane<FragmentA>& a, const PerLane<FragmentB>& b) {
  float a_matrix[16][16];
  float b_matrix[16][8];
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    const int row = lane / 4;
    const int column = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      for (int word = 0; word < 4; ++word) {
        a_matrix[row + word % 2 * 8][column + word / 2 * 8 + i] = HalfOfWord(a[lane].word[word], i);
      }
      for (int word = 0; word < 2; ++word) {
        b_matrix[column + word * 8 + i][row] = HalfOfWord(b[lane].word[word], i);
      }
    }
  }
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      double sum = (*c)[lane].at[i];
      for (int k = 0; k < 16; ++k) {
        sum += double{a_matrix[lane / 4 + i / 2 * 8][k]} * b_matrix[k][lane % 4 * 2 + i % 2];
      }
      (*c)[lane].at[i] = RoundTowardZero(sum);
    }
  }
}

inline float Exp2(float value) { return std::exp2(value); }

inline uint32_t SelectBytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t selected = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7U)) & 0xFFU;
    selected |= byte << 8 * i;
  }
  return selected;
}

inline uint32_t Subtract1152(uint32_t halves) {
  return PackHalves(ToHalf(HalfOfWord(halves, 0) - 1152.0f),
                    ToHalf(HalfOfWord(halves, 1) - 1152.0f));
}

// Reads the bytes' ends, so that the sanitizers see what is asked for outside of an array.
template <int kBytes>
void Prefetch(const int8_t* from) {
  static_cast<void>(*static_cast<const volatile int8_t*>(from));
  static_cast<void>(*static_cast<const volatile int8_t*>(from + kBytes - 1));
}

template <int kBytes>
Pack<uint32_t, kBytes / 4> LoadCodes(const int8_t* from) {
  return *reinterpret_cast<const Pack<uint32_t, kBytes / 4>*>(from);
}

}  // namespace jax_kvcache::cuda

#endif  // JAX_KVCACHE_FFI_CUDA_WARP_HOST_H_
