// Owns what the host asks about the card that a call runs on.
#include <cuda_runtime.h>

#include "cuda/card.h"

namespace jax_kvcache::cuda {

int CountMultiprocessors() {
  int device = 0;
  int count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 0;
  return count;
}

}  // namespace jax_kvcache::cuda
