// Owns the checks that the stand-in makes before it accepts a call.
#ifndef JAX_KVCACHE_FFI_STANDIN_VALIDATION_H_
#define JAX_KVCACHE_FFI_STANDIN_VALIDATION_H_

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

// Returns 0, or 161001, 161002 or 561002 with the meaning that the operator's documentation gives,
// and sets `message` to the reason.
int32_t CheckCall(const aclTensor* const* tensors, const Attributes& attributes,
                  std::string* message);

// The received descriptors as JSON, which the tests compare with the operator's documentation.
std::string DescriptorsJson(const aclTensor* const* tensors, const Attributes& attributes);

}  // namespace standin

#endif  // JAX_KVCACHE_FFI_STANDIN_VALIDATION_H_
