// Owns the executor, which carries a call from the first of the operator's two functions to the
// second.
#ifndef JAX_KVCACHE_FFI_STANDIN_EXECUTOR_H_
#define JAX_KVCACHE_FFI_STANDIN_EXECUTOR_H_

#include <cstdint>

#include "objects.h"

namespace standin {

// The operator's tensors, in the order of its parameters.
enum Operand : int {
  kX,
  kCos,
  kSin,
  kKCache,
  kVCache,
  kIndices,
  kScaleK,
  kScaleV,
  kOffsetK,
  kOffsetV,
  kWeightScale,
  kActivationScale,
  kBias,
  kQOut,
  kKOut,
  kVOut,
  kNumOperands,
};

inline constexpr const char* kOperandNames[kNumOperands] = {
    "x",       "cos",     "sin",      "k_cache",  "v_cache",      "indices",
    "scale_k", "scale_v", "offset_k", "offset_v", "weight_scale", "activation_scale",
    "bias",    "q",       "k",        "v"};

}  // namespace standin

struct aclOpExecutor {
  const aclTensor* tensors[standin::kNumOperands];  // null where absent
  bool kv_output;
  bool repeatable;
  bool asked_to_be_repeatable;  // also if that failed
};

#endif  // JAX_KVCACHE_FFI_STANDIN_EXECUTOR_H_
