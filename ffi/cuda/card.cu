// Owns what the host asks about the card that a call runs on, and about its driver.
#include <cuda_runtime.h>

#include "cuda/card.h"

// The CUDA version that the driver knows, or 0 if there is no driver, and the one that the library
// was built with: each 1000 * major + 10 * minor. Python asks before it lets a call come here.
extern "C" __attribute__((visibility("default"))) void jax_kvcache_cuda_versions(int* driver,
                                                                                 int* built) {
  if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
  if (cudaRuntimeGetVersion(built) != cudaSuccess) *built = 0;
}

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
