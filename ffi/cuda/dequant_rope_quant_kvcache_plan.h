// Owns how a call of dequant_rope_quant_kvcache is divided among GPU threads.
#ifndef JAX_KVCACHE_FFI_CUDA_DEQUANT_ROPE_QUANT_KVCACHE_PLAN_H_
#define JAX_KVCACHE_FFI_CUDA_DEQUANT_ROPE_QUANT_KVCACHE_PLAN_H_

#include <cstdint>

#include "core/dequant_rope_quant_kvcache_buffers.h"

namespace jax_kvcache::dequant_rope_quant_kvcache::cuda {

// The columns of each half of a head that one thread computes, where D and the addresses allow
// accesses of 16 bytes; elsewhere a thread computes one column.
inline constexpr int kWideColumns = 4;

struct Plan {
  int columns = 1;            // of each half of a head, per thread: 1 or kWideColumns
  int tokens_per_thread = 1;  // they share what is read of the parameters
  int64_t threads = 0;
};

// Looks at the pointers' alignment and at nothing that they point to.
Plan MakePlan(const Shape& shape, const Buffers& buffers);

}  // namespace jax_kvcache::dequant_rope_quant_kvcache::cuda

#endif  // JAX_KVCACHE_FFI_CUDA_DEQUANT_ROPE_QUANT_KVCACHE_PLAN_H_
