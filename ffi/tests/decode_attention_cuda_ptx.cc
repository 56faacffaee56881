// Owns the run of the CUDA kernels' PTX.
#include <string>

#include "cuda/decode_attention_finish.h"
#include "cuda/launch.h"
#include "tests/decode_attention_cuda_kernels.h"
#include "tests/ptx/grid.h"

namespace jax_kvcache::decode_attention {

void RunKernels(const cuda::Arguments& arguments, const std::vector<ptx::Array>& arrays) {
  using jax_kvcache::cuda::kBlockThreads;
  ptx::RunGrid("Kernel<" + std::to_string(arguments.shape.head_dim) + ">", arrays,
               arguments.Blocks(), cuda::kWarps * ptx::kWarpLanes, arguments);
  if (arguments.splits == 1) return;
  const int64_t threads = cuda::MergingThreads(arguments.shape);
  ptx::RunGrid("Kernel", arrays, jax_kvcache::cuda::CeilDivide<int64_t>(threads, kBlockThreads),
               kBlockThreads, arguments);
}

}  // namespace jax_kvcache::decode_attention
