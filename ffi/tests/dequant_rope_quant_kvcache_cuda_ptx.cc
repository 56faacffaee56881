// Owns the run of the CUDA kernel's PTX.
#include <string>
#include <type_traits>

#include "cuda/dequant_rope_quant_kvcache_dispatch.h"
#include "cuda/launch.h"
#include "tests/dequant_rope_quant_kvcache_cuda_threads.h"
#include "tests/ptx/grid.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {
namespace {

template <typename T>
std::string NameOf(cuda::TypeOf<T> /*type*/) {
  if (std::is_same_v<T, jax_kvcache::cuda::Half>) return "jax_kvcache::cuda::Half";
  if (std::is_same_v<T, jax_kvcache::cuda::BFloat>) return "jax_kvcache::cuda::BFloat";
  return std::is_same_v<T, float> ? "float" : "int";
}

}  // namespace

void RunThreads(const Shape& shape, const Buffers& buffers, const cuda::Plan& plan,
                const std::vector<ptx::Array>& arrays) {
  using jax_kvcache::cuda::kBlockThreads;
  cuda::Dispatch(shape, plan, [&](auto x, auto table, auto columns) {
    const std::string name = "Kernel<" + NameOf(x) + ", " + NameOf(table) + ", " +
                             std::to_string(decltype(columns)::value) + ">";
    ptx::RunGrid(name, arrays, jax_kvcache::cuda::CeilDivide<int64_t>(plan.threads, kBlockThreads),
                 kBlockThreads, shape, buffers, plan.tokens_per_thread);
  });
}

}  // namespace jax_kvcache::dequant_rope_quant_kvcache
