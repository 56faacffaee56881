// Owns the operator's arithmetic in its plainest form: one value at a time, one rounding per step.
#ifndef JAX_KVCACHE_STANDIN_ARITHMETIC_H_
#define JAX_KVCACHE_STANDIN_ARITHMETIC_H_

#include <array>
#include <cstdint>

#include "executor.h"

namespace standin {

// A launched call: copies of the descriptors, whose data are device addresses.
struct Launched {
  std::array<aclTensor, kNumOperands> tensors;
  std::array<bool, kNumOperands> given;
  bool kv_output;
};

// Executes the call in page mode.  `row` is workspace for H floats.
void Execute(const Launched& call, float* row);

}  // namespace standin

#endif  // JAX_KVCACHE_STANDIN_ARITHMETIC_H_
