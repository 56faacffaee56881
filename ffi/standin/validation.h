// Owns the checks that the stand-in makes of a call before it accepts it.
#ifndef JAX_KVCACHE_STANDIN_VALIDATION_H_
#define JAX_KVCACHE_STANDIN_VALIDATION_H_

#include <cstdint>
#include <string>

#include "executor.h"

namespace standin {

struct Attributes {
  const aclIntArray* size_splits;
  const char* quant_mode;
  const char* layout;
  const char* cache_mode;
  bool kv_output;
};

// Returns 0, 161001, 161002 or 561002 as the operator documents them, and why in `message`.
int32_t CheckCall(const aclTensor* const* tensors, const Attributes& attributes,
                  std::string* message);

// What was received, as JSON: the tests compare it with the operator's documentation.
std::string DescriptorsJson(const aclTensor* const* tensors, const Attributes& attributes);

}  // namespace standin

#endif  // JAX_KVCACHE_STANDIN_VALIDATION_H_
