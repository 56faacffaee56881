// Owns the CUDA kernel of decode_attention. It is compiled once for each head size,
// JAX_KVCACHE_HEAD_DIM, so that the compilations run side by side.
#include <cuda_runtime.h>

#include "cuda/decode_attention_block.h"
#include "cuda/decode_attention_kernel.h"
#include "cuda/launch_kernel.h"

namespace jax_kvcache::decode_attention::cuda {
namespace {

constexpr int kThreads = kWarps * kWarpLanes;

template <int D>
__global__ void __launch_bounds__(kThreads, BlocksTogether(D))
    Kernel(const __grid_constant__ Arguments arguments) {
  __shared__ Shared<D> shared;
  Block<D>(arguments, blockIdx.x, &shared).Run();
}

}  // namespace

template <>
const char* LaunchBlocks<JAX_KVCACHE_HEAD_DIM>(const Arguments& arguments,
                                               jax_kvcache::cuda::Stream stream) {
  return jax_kvcache::cuda::LaunchKernel(Kernel<JAX_KVCACHE_HEAD_DIM>, arguments.Blocks(), kThreads,
                                         stream, arguments);
}

}  // namespace jax_kvcache::decode_attention::cuda
