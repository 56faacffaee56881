// Owns the warp's operations on a GPU; warp.h explains them and includes this file.
#ifndef JAX_KVCACHE_FFI_CUDA_WARP_DEVICE_H_
#define JAX_KVCACHE_FFI_CUDA_WARP_DEVICE_H_

namespace jax_kvcache::cuda {

inline constexpr unsigned kAllLanes = 0xFFFFFFFFU;

template <typename T>
struct PerLane {
  T value;
  __device__ __forceinline__ T& operator[](int) { return value; }
  __device__ __forceinline__ const T& operator[](int) const { return value; }
};

template <typename Body>
__device__ __forceinline__ void EachLane(const Body& body) {
  body(static_cast<int>(threadIdx.x % kWarpLanes));
}

// What warps have of their own, in a block of kWarps, and what each does alone.
template <typename T, int kWarps>
struct PerWarp {
  T value;
  __device__ __forceinline__ T& operator[](int) { return value; }
};

template <int kWarps, typename Body>
__device__ __forceinline__ void EachWarp(const Body& body) {
  body(static_cast<int>(threadIdx.x / kWarpLanes));
}

// All that the block's threads wrote to shared memory is seen by all of them afterwards.
__device__ __forceinline__ void SyncBlock() { __syncthreads(); }

// The value of lane `source(lane)`, for each lane.
template <typename T, typename Source>
__device__ __forceinline__ PerLane<T> Shuffle(const PerLane<T>& from, const Source& source) {
  return {__shfl_sync(kAllLanes, from.value, source(static_cast<int>(threadIdx.x % kWarpLanes)))};
}

// Bit `lane` is set where that lane's value is true.
__device__ __forceinline__ uint32_t Ballot(const PerLane<bool>& value) {
  return __ballot_sync(kAllLanes, value.value);
}

// The largest value, and the sum, among the kLanes neighbouring lanes with the same lane / kLanes.
// The largest of a number and NaN is the number.
template <int kLanes>
__device__ __forceinline__ void MaxOf(PerLane<float>* value) {
  for (int mask = 1; mask < kLanes; mask *= 2) {
    value->value = fmaxf(value->value, __shfl_xor_sync(kAllLanes, value->value, mask));
  }
}
template <int kLanes>
__device__ __forceinline__ void SumOf(PerLane<float>* value) {
  for (int mask = 1; mask < kLanes; mask *= 2) {
    value->value += __shfl_xor_sync(kAllLanes, value->value, mask);
  }
}

// The smallest and the largest value among all lanes.
__device__ __forceinline__ uint32_t Smallest(const PerLane<uint32_t>& value) {
  return __reduce_min_sync(kAllLanes, value.value);
}
__device__ __forceinline__ uint32_t Largest(const PerLane<uint32_t>& value) {
  return __reduce_max_sync(kAllLanes, value.value);
}

// C += A B, the products exact.
__device__ __forceinline__ void Mma(PerLane<FragmentC>* c_lanes, const PerLane<FragmentA>& a_lanes,
                                    const PerLane<FragmentB>& b_lanes) {
  float* const c = c_lanes->value.at;
  const uint32_t* const a = a_lanes.value.word;
  const uint32_t* const b = b_lanes.value.word;
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 2 ** value; 0 for what is less than the smallest normal number.
__device__ __forceinline__ float Exp2(float value) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
  return power;
}

// Byte i of the result is byte (selector >> 4 * i) % 8 of the eight bytes of low and high.
__device__ __forceinline__ uint32_t SelectBytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// Each of the two float16 less 1152.
__device__ __forceinline__ uint32_t Subtract1152(uint32_t halves) {
  asm("sub.f16x2 %0, %0, %1;" : "+r"(halves) : "r"(0x64806480U));
  return halves;
}

// Asks for kBytes bytes of a cache to be brought into the card's L2 cache, and waits for nothing.
// One request brings a line of 128 bytes; XLA's arrays begin at a line.
template <int kBytes>
__device__ __forceinline__ void Prefetch(const int8_t* from) {
#pragma unroll
  for (int i = 0; i < kBytes; i += 128) asm volatile("prefetch.global.L2 [%0];" : : "l"(from + i));
  if constexpr (kBytes < 128 && 128 % kBytes != 0) {  // they may lie in two lines
    asm volatile("prefetch.global.L2 [%0];" : : "l"(from + kBytes - 1));
  }
}

// Reads kBytes bytes of a cache, which no later step of this kernel reads again.
template <int kBytes>
__device__ __forceinline__ Pack<uint32_t, kBytes / 4> LoadCodes(const int8_t* from) {
  Pack<uint32_t, kBytes / 4> codes;
  if constexpr (kBytes == 16) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(codes.at[0]), "=r"(codes.at[1]), "=r"(codes.at[2]), "=r"(codes.at[3])
                 : "l"(from));
  } else if constexpr (kBytes == 8) {
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];"
                 : "=r"(codes.at[0]), "=r"(codes.at[1])
                 : "l"(from));
  } else {
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(codes.at[0]) : "l"(from));
  }
  return codes;
}

}  // namespace jax_kvcache::cuda

#endif  // JAX_KVCACHE_FFI_CUDA_WARP_DEVICE_H_
