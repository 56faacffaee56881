// Owns the run of the CUDA kernels' C++ with the lanes of a warp in step.
#include <cstring>
#include <string>

#include "cuda/decode_attention_block.h"
#include "tests/check.h"
#include "tests/decode_attention_cuda_kernels.h"

namespace jax_kvcache::decode_attention {
namespace {

template <int D>
void RunBlocks(const cuda::Arguments& arguments) {
  for (uint32_t block = 0; block < arguments.Blocks(); ++block) {
    cuda::Shared<D> shared;
    std::memset(static_cast<void*>(&shared), 0x7F, sizeof(shared));  // NaN
    cuda::Block<D>(arguments, block, &shared).Run();
  }
}

template <int... kDims>
void RunBlocksOf(const cuda::Arguments& arguments, std::integer_sequence<int, kDims...> /*dims*/) {
  const bool ran =
      ((arguments.shape.head_dim == kDims && (RunBlocks<kDims>(arguments), true)) || ...);
  Check(ran, "no kernel for D = " + std::to_string(arguments.shape.head_dim));
}

}  // namespace

void RunKernels(const cuda::Arguments& arguments, const std::vector<ptx::Array>& /*arrays*/) {
  RunBlocksOf(arguments, HeadDims());
  if (arguments.splits == 1) return;
  const int64_t threads = cuda::MergingThreads(arguments.shape);
  for (uint32_t i = 0; i < threads + 5; ++i) cuda::MergeSplits(arguments, i);
}

}  // namespace jax_kvcache::decode_attention
