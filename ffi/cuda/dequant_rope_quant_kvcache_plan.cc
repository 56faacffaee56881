// Owns the choice of how wide each GPU thread of dequant_rope_quant_kvcache is.
#include "cuda/dequant_rope_quant_kvcache_plan.h"

#include <cstdint>

#include "cuda/device.h"

namespace jax_kvcache::dequant_rope_quant_kvcache::cuda {
namespace {

// From this many tokens on, a thread takes several of them: there are enough threads without that,
// and the scales and biases, which are as large as a token, are read once for all of them.
constexpr int64_t kManyTokens = 512;
constexpr int kTokensPerThread = 4;
constexpr int64_t kMostThreads = int64_t{1} << 31;

bool IsAligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;  // null is
}

bool MayBeWide(const Shape& shape, const Buffers& b) {
  if (shape.head_dim / 2 % kWideColumns != 0) return false;
  for (const void* cache : {b.k_cache, b.v_cache}) {
    if (!IsAligned(cache, kWideColumns)) return false;
  }
  const void* const others[] = {b.x,       b.cos,      b.sin,      b.scale_k,
                                b.scale_v, b.offset_k, b.offset_v, b.weight_scale,
                                b.bias,    b.q,        b.k,        b.v};
  for (const void* pointer : others) {
    if (!IsAligned(pointer, 16)) return false;
  }
  return true;
}

}  // namespace

Plan MakePlan(const Shape& shape, const Buffers& buffers) {
  Plan plan;
  if (MayBeWide(shape, buffers)) plan.columns = kWideColumns;
  if (shape.all_tokens() >= kManyTokens) plan.tokens_per_thread = kTokensPerThread;
  const int64_t threads_per_run =
      shape.groups.count * shape.num_heads() * (shape.head_dim / 2 / plan.columns);
  const auto count = [&] {
    const int64_t runs =
        jax_kvcache::cuda::CeilDivide<int64_t>(shape.tokens, plan.tokens_per_thread);
    return runs * threads_per_run;
  };
  // Threads are numbered in 32 bits.
  while (count() > kMostThreads && plan.tokens_per_thread < shape.tokens) {
    plan.tokens_per_thread *= 2;
  }
  plan.threads = count();
  return plan;
}

}  // namespace jax_kvcache::dequant_rope_quant_kvcache::cuda
