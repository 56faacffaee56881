// Owns the stand-in's definitions of CANN's opaque types.
#ifndef JAX_KVCACHE_FFI_STANDIN_OBJECTS_H_
#define JAX_KVCACHE_FFI_STANDIN_OBJECTS_H_

#include <cstdint>
#include <vector>

#include "aclnn/acl_meta.h"

struct aclTensor {
  std::vector<int64_t> dims;
  std::vector<int64_t> strides;  // in elements
  std::vector<int64_t> storage_dims;
  int dtype;
  int format;
  int64_t offset;
  void* data;
};

struct aclIntArray {
  std::vector<int64_t> values;
};

#endif  // JAX_KVCACHE_FFI_STANDIN_OBJECTS_H_
