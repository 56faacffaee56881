// Owns the interface of what runs the CUDA kernels of decode_attention on the host: their C++ with
// the lanes of a warp in step, or the PTX that nvcc compiles it to.
#ifndef JAX_KVCACHE_FFI_TESTS_DECODE_ATTENTION_CUDA_KERNELS_H_
#define JAX_KVCACHE_FFI_TESTS_DECODE_ATTENTION_CUDA_KERNELS_H_

#include <utility>
#include <vector>

#include "cuda/decode_attention_call.h"
#include "tests/ptx/machine.h"

namespace jax_kvcache::decode_attention {

// The D that the kernels are compiled for.
using HeadDims = std::integer_sequence<int, 64, 80, 96, 112, 128, 192, 256>;

// `arrays` are those that the arguments point to.
void RunKernels(const cuda::Arguments& arguments, const std::vector<ptx::Array>& arrays);

}  // namespace jax_kvcache::decode_attention

#endif  // JAX_KVCACHE_FFI_TESTS_DECODE_ATTENTION_CUDA_KERNELS_H_
