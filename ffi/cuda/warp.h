// Owns the operations that the 32 lanes of a warp do together. A kernel's code is written once over
// them: what a lane has of its own is a PerLane, and what it does alone is a function of the lane
// that EachLane calls. On a GPU a PerLane is a register and EachLane calls the function for the
// lane that it runs on; on the host, for the tests, a PerLane has 32 elements and EachLane goes
// through the lanes, so that they stay in step. Everything outside of EachLane is the same for all
// lanes of a warp.
#ifndef JAX_KVCACHE_FFI_CUDA_WARP_H_
#define JAX_KVCACHE_FFI_CUDA_WARP_H_

#include <cstdint>

#include "cuda/numbers.h"

namespace jax_kvcache::cuda {

inline constexpr int kWarpLanes = 32;

// What a lane has of the operands of Mma. With g = lane / 4 and c = lane % 4:
struct FragmentA {   // of A [16, 16], float16, two in each word
  uint32_t word[4];  // A[g, 2c..], A[g + 8, 2c..], A[g, 2c + 8..], A[g + 8, 2c + 8..]
};
struct FragmentB {   // of B [16, 8], float16, two in each word
  uint32_t word[2];  // B[2c.., g], B[2c + 8.., g]
};
struct FragmentC {  // of C [16, 8], float32
  float at[4];      // C[g, 2c], C[g, 2c + 1], C[g + 8, 2c], C[g + 8, 2c + 1]
};

// Two float16 in a word, the first in the lower half.
JAX_KVCACHE_DEVICE uint32_t PackHalves(Half low, Half high) {
  return static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits) << 16;
}

}  // namespace jax_kvcache::cuda

#if defined(__CUDACC__)
#include "cuda/warp_device.h"
#else
#include "cuda/warp_host.h"
#endif

#endif  // JAX_KVCACHE_FFI_CUDA_WARP_H_
