// Owns the CUDA kernel that merges the partial results of decode_attention's splits.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/decode_attention_finish.h"
#include "cuda/decode_attention_kernel.h"
#include "cuda/launch_kernel.h"

namespace jax_kvcache::decode_attention::cuda {
namespace {

using jax_kvcache::cuda::kBlockThreads;

__global__ void __launch_bounds__(kBlockThreads)
    Kernel(const __grid_constant__ Arguments arguments) {
  MergeSplits(arguments, blockIdx.x * kBlockThreads + threadIdx.x);
}

}  // namespace

const char* LaunchMerge(const Arguments& arguments, jax_kvcache::cuda::Stream stream) {
  const int64_t threads = MergingThreads(arguments.shape);
  const int64_t blocks = jax_kvcache::cuda::CeilDivide<int64_t>(threads, kBlockThreads);
  return jax_kvcache::cuda::LaunchKernel(Kernel, blocks, kBlockThreads, stream, arguments);
}

}  // namespace jax_kvcache::decode_attention::cuda
