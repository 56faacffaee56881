// Owns the run of a kernel of those whose PTX the test was built with.
#ifndef JAX_KVCACHE_FFI_TESTS_PTX_GRID_H_
#define JAX_KVCACHE_FFI_TESTS_PTX_GRID_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "tests/ptx/program.h"

namespace jax_kvcache::ptx {

// The kernel with this name, without namespaces and parameters: Kernel<128>.
const Program& Compiled(const std::string& name);

template <typename T>
void AppendParameter(const T& parameter, std::vector<uint8_t>* bytes) {
  const size_t begin = (bytes->size() + alignof(T) - 1) / alignof(T) * alignof(T);
  bytes->resize(begin + sizeof(T));
  std::memcpy(bytes->data() + begin, &parameter, sizeof(T));
}

// Runs so many blocks of so many threads.
template <typename... Parameters>
void RunGrid(const std::string& name, const std::vector<Array>& arrays, int64_t blocks, int threads,
             const Parameters&... parameters) {
  std::vector<uint8_t> bytes;
  (AppendParameter(parameters, &bytes), ...);
  RunBlocks(Compiled(name), arrays, bytes, blocks, threads);
}

}  // namespace jax_kvcache::ptx

#endif  // JAX_KVCACHE_FFI_TESTS_PTX_GRID_H_
