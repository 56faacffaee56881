// Owns the CUDA kernel of dequant_rope_quant_kvcache and its launch.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/dequant_rope_quant_kvcache_dispatch.h"
#include "cuda/dequant_rope_quant_kvcache_kernel.h"
#include "cuda/launch_kernel.h"

namespace jax_kvcache::dequant_rope_quant_kvcache::cuda {
namespace {

using jax_kvcache::cuda::kBlockThreads;

// So many blocks share a multiprocessor's registers.
constexpr int kBlocksTogether = 6;

template <typename X, typename Table, int kColumns>
__global__ void __launch_bounds__(kBlockThreads, kBlocksTogether)
    Kernel(const __grid_constant__ Shape shape, const __grid_constant__ Buffers buffers,
           const int tokens_per_thread) {
  const uint32_t index = blockIdx.x * kBlockThreads + threadIdx.x;
  Thread<X, Table, kColumns>(shape, buffers).Run(index, tokens_per_thread);
}

}  // namespace

const char* Launch(const Shape& shape, const Buffers& buffers, const Plan& plan,
                   jax_kvcache::cuda::Stream stream) {
  const int64_t blocks = jax_kvcache::cuda::CeilDivide<int64_t>(plan.threads, kBlockThreads);
  return Dispatch(shape, plan, [&](auto x, auto table, auto columns) {
    return jax_kvcache::cuda::LaunchKernel(
        Kernel<typename decltype(x)::type, typename decltype(table)::type,
               decltype(columns)::value>,
        blocks, kBlockThreads, stream, shape, buffers, plan.tokens_per_thread);
  });
}

}  // namespace jax_kvcache::dequant_rope_quant_kvcache::cuda
