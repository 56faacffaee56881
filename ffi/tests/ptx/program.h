// Owns a kernel in PTX, and how it is run.
#ifndef JAX_KVCACHE_FFI_TESTS_PTX_PROGRAM_H_
#define JAX_KVCACHE_FFI_TESTS_PTX_PROGRAM_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "tests/ptx/instructions.h"
#include "tests/ptx/machine.h"

namespace jax_kvcache::ptx {

struct Instruction {
  enum class Kind { kLanes, kWarp, kJump, kBarrier, kEnd };
  static constexpr int kNoPredicate = -1;

  std::string text;
  Kind kind = Kind::kLanes;
  int predicate = kNoPredicate;  // register; it is done where that is true, or where it is false
  bool where_false = false;
  Operation operation;
  size_t jump_to = 0;
};

struct Program {
  std::vector<Instruction> instructions;
  int registers = 0;
  std::vector<std::pair<int, uint64_t>> constants;  // registers that are a number in the text
  int thread_register = 0;                          // %tid.x
  int block_register = 0;                           // %ctaid.x
  size_t shared_size = 0;
  size_t parameters_size = 0;
};

// The kernels of a PTX file, by their C++ names.
std::map<std::string, Program> Load(const std::string& path);

// Runs the blocks one after the other. Lanes that part ways go on with the instruction that is
// first in the text, until they meet again. It fails where lanes come to a warp's operation or to a
// barrier apart, where shared memory is used without a barrier, and where an access is misaligned
// or outside of `arrays`. What nothing was written to has the bits of a NaN.
void RunBlocks(const Program& program, const std::vector<Array>& arrays,
               const std::vector<uint8_t>& parameters, int64_t blocks, int threads);

}  // namespace jax_kvcache::ptx

#endif  // JAX_KVCACHE_FFI_TESTS_PTX_PROGRAM_H_
