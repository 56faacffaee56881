// Owns the interface of the CUDA kernel of dequant_rope_quant_kvcache.
#ifndef JAX_KVCACHE_FFI_CUDA_DEQUANT_ROPE_QUANT_KVCACHE_KERNEL_H_
#define JAX_KVCACHE_FFI_CUDA_DEQUANT_ROPE_QUANT_KVCACHE_KERNEL_H_

#include "core/dequant_rope_quant_kvcache_buffers.h"
#include "cuda/dequant_rope_quant_kvcache_plan.h"
#include "cuda/launch.h"

namespace jax_kvcache::dequant_rope_quant_kvcache::cuda {

// Puts the kernel on the stream and returns without waiting for it. Returns null, or CUDA's text of
// what went wrong.
const char* Launch(const Shape& shape, const Buffers& buffers, const Plan& plan,
                   jax_kvcache::cuda::Stream stream);

}  // namespace jax_kvcache::dequant_rope_quant_kvcache::cuda

#endif  // JAX_KVCACHE_FFI_CUDA_DEQUANT_ROPE_QUANT_KVCACHE_KERNEL_H_
