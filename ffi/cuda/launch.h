// Owns how the handlers, which a C++ compiler compiles, name CUDA's types without its headers.
#ifndef JAX_KVCACHE_FFI_CUDA_LAUNCH_H_
#define JAX_KVCACHE_FFI_CUDA_LAUNCH_H_

struct CUstream_st;

namespace jax_kvcache::cuda {

using Stream = CUstream_st*;  // cudaStream_t

// The threads of a block of the write's kernel and of the merging kernel.
inline constexpr int kBlockThreads = 128;

}  // namespace jax_kvcache::cuda

#endif  // JAX_KVCACHE_FFI_CUDA_LAUNCH_H_
