// Owns the interface of what PTX's instructions do.
#ifndef JAX_KVCACHE_FFI_TESTS_PTX_INSTRUCTIONS_H_
#define JAX_KVCACHE_FFI_TESTS_PTX_INSTRUCTIONS_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "tests/ptx/machine.h"

namespace jax_kvcache::ptx {

// The registers of an instruction in the order of its text, the elements of vectors one by one, and
// what is added to the address where it has one.
struct Operands {
  std::vector<int> registers;
  int64_t offset = 0;

  int operator[](size_t i) const { return registers.at(i); }
};

// Does an instruction for these lanes of a warp.
using Operation = std::function<void(Warp&, Lanes)>;

// The operation of an instruction that is neither a jump, a barrier nor an end. Fails for one that
// is not known; then it can be added to the table, from NVIDIA's description of PTX.
Operation MakeOperation(const std::string& name, const Operands& operands);

// Whether the lanes of a warp do it together, so that all of them must have come to it.
bool IsWarpWide(const std::string& name);

// MakeOperation calls these for what a warp does together, and for what accesses memory.
Operation MakeWarpOperation(const std::string& name, const Operands& operands);
Operation MakeMemoryOperation(const std::string& name, const Operands& operands);

}  // namespace jax_kvcache::ptx

#endif  // JAX_KVCACHE_FFI_TESTS_PTX_INSTRUCTIONS_H_
