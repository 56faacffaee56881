// Owns the interface of the CUDA kernels of decode_attention.
#ifndef JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_KERNEL_H_
#define JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_KERNEL_H_

#include "cuda/decode_attention_call.h"
#include "cuda/launch.h"

namespace jax_kvcache::decode_attention::cuda {

// Each puts its kernel on the stream and returns without waiting for it. It returns null, or CUDA's
// text of what went wrong.
template <int D>
const char* LaunchBlocks(const Arguments& arguments, jax_kvcache::cuda::Stream stream);
const char* LaunchMerge(const Arguments& arguments, jax_kvcache::cuda::Stream stream);

// Both of them, the second where the rows are split.
const char* Launch(const Arguments& arguments, jax_kvcache::cuda::Stream stream);

}  // namespace jax_kvcache::decode_attention::cuda

#endif  // JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_KERNEL_H_
