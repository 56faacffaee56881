// Owns the run of the CUDA kernels' PTX.
#include <string>

#include "cuda/decode_attention_finish.h"
#include "cuda/launch.h"
#include "tests/decode_attention_cuda_kernels.h"
#include "tests/ptx/grid.h"

namespace jax_kvcache::decode_attention {

void RunKernels(const cuda::Arguments& arguments, const std::vector<ptx::Array>& arrays) {
  using jax_kvcache::cuda::kBlockThreads;
  const Shape& shape = arguments.shape;
  ptx::RunGrid("Kernel<" + std::to_string(shape.head_dim) + ">", arrays, arguments.Blocks(),
               cuda::kWarps * ptx::kWarpLanes, arguments);
  if (arguments.splits == 1) return;
  const int64_t threads = shape.groups.count * shape.sequences * shape.queries * shape.num_q_heads *
                          (shape.head_dim / cuda::kMergedColumns);
  ptx::RunGrid("Kernel", arrays, jax_kvcache::cuda::CeilDivide<int64_t>(threads, kBlockThreads),
               kBlockThreads, arguments);
}

}  // namespace jax_kvcache::decode_attention
