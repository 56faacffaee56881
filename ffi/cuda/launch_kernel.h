// Owns how a kernel is put on a stream. Only nvcc compiles it.
#ifndef JAX_KVCACHE_FFI_CUDA_LAUNCH_KERNEL_H_
#define JAX_KVCACHE_FFI_CUDA_LAUNCH_KERNEL_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace jax_kvcache::cuda {

// The CUDA context that is current on this thread is XLA's. Returns null, or CUDA's text of what
// went wrong. The parameters are those of the kernel, whose types must be the kernel's own.
template <typename... Parameters>
const char* LaunchKernel(void (*kernel)(Parameters...), int64_t blocks, int threads,
                         cudaStream_t stream, std::remove_const_t<Parameters>... parameters) {
  if (blocks > INT32_MAX) return "the call needs more blocks of threads than a grid can have";
  void* addresses[] = {&parameters...};
  const cudaError_t error =
      cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)),
                       dim3(static_cast<unsigned>(threads)), addresses, 0, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_kvcache::cuda

#endif  // JAX_KVCACHE_FFI_CUDA_LAUNCH_KERNEL_H_
