// Owns the interface of what runs the CUDA kernel's threads on the host: their C++, or the PTX that
// nvcc compiles it to.
#ifndef JAX_KVCACHE_FFI_TESTS_DEQUANT_ROPE_QUANT_KVCACHE_CUDA_THREADS_H_
#define JAX_KVCACHE_FFI_TESTS_DEQUANT_ROPE_QUANT_KVCACHE_CUDA_THREADS_H_

#include <vector>

#include "core/dequant_rope_quant_kvcache_buffers.h"
#include "cuda/dequant_rope_quant_kvcache_plan.h"
#include "tests/ptx/machine.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {

// `arrays` are those of the buffers.
void RunThreads(const Shape& shape, const Buffers& buffers, const cuda::Plan& plan,
                const std::vector<ptx::Array>& arrays);

}  // namespace jax_kvcache::dequant_rope_quant_kvcache

#endif  // JAX_KVCACHE_FFI_TESTS_DEQUANT_ROPE_QUANT_KVCACHE_CUDA_THREADS_H_
