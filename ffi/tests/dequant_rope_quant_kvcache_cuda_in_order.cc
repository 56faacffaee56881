// Owns the run of the CUDA kernel's C++, one thread after the other.
#include "cuda/dequant_rope_quant_kvcache_dispatch.h"
#include "tests/dequant_rope_quant_kvcache_cuda_threads.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {

void RunThreads(const Shape& shape, const Buffers& buffers, const cuda::Plan& plan,
                const std::vector<ptx::Array>& /*arrays*/) {
  cuda::Dispatch(shape, plan, [&](auto x, auto table, auto columns) {
    using Thread = cuda::Thread<typename decltype(x)::type, typename decltype(table)::type,
                                decltype(columns)::value>;
    // A grid's last block has threads past the end.
    for (int64_t i = 0; i < plan.threads + 5; ++i) {
      Thread(shape, buffers).Run(i, plan.tokens_per_thread);
    }
  });
}

}  // namespace jax_kvcache::dequant_rope_quant_kvcache
