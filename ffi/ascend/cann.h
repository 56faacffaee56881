// Owns the declarations of the nine functions of CANN's C interface that the Ascend handler calls.
// They are repeated here so that the library builds without CANN; cann_check.cc compares them with
// CANN's own headers.
#ifndef JAX_KVCACHE_FFI_ASCEND_CANN_H_
#define JAX_KVCACHE_FFI_ASCEND_CANN_H_

#include <cstdint>

struct aclTensor;
struct aclIntArray;
struct aclOpExecutor;

namespace jax_kvcache::cann {

using Status = int32_t;  // aclnnStatus
using Stream = void*;    // aclrtStream

constexpr Status kSuccess = 0;

// Values of aclDataType and aclFormat, which are C enums and so are passed as int.
enum DataType : int { kFloat = 0, kFloat16 = 1, kInt8 = 2, kInt32 = 3, kBf16 = 27 };
enum Format : int { kFormatNd = 2 };

// aclnn/acl_meta.h, exported by libnnopbase.so.
using CreateTensorFn = aclTensor*(const int64_t* view_dims, uint64_t view_dims_num, int data_type,
                                  const int64_t* stride, int64_t offset, int format,
                                  const int64_t* storage_dims, uint64_t storage_dims_num,
                                  void* data);
using DestroyTensorFn = Status(const aclTensor* tensor);
using CreateIntArrayFn = aclIntArray*(const int64_t* value, uint64_t size);
using DestroyIntArrayFn = Status(const aclIntArray* array);
// The next two are documented from CANN 8.0 on.
using SetExecutorRepeatableFn = Status(aclOpExecutor* executor);
using DestroyExecutorFn = Status(aclOpExecutor* executor);

// aclnnop/aclnn_dequant_rope_quant_kvcache.h, exported by libopapi.so or one of its successors.
using GetWorkspaceSizeFn = Status(const aclTensor* x, const aclTensor* cos, const aclTensor* sin,
                                  aclTensor* k_cache, aclTensor* v_cache, const aclTensor* indices,
                                  const aclTensor* scale_k, const aclTensor* scale_v,
                                  const aclTensor* offset_k, const aclTensor* offset_v,
                                  const aclTensor* weight_scale, const aclTensor* activation_scale,
                                  const aclTensor* bias, const aclIntArray* size_splits,
                                  char* quant_mode, char* layout, bool kv_output, char* cache_mode,
                                  const aclTensor* q, const aclTensor* k, const aclTensor* v,
                                  uint64_t* workspace_size, aclOpExecutor** executor);
using LaunchFn = Status(void* workspace, uint64_t workspace_size, aclOpExecutor* executor,
                        Stream stream);

// acl/acl.h, exported by libascendcl.so. The result may be null.
using GetRecentErrMsgFn = const char*();

}  // namespace jax_kvcache::cann

#endif  // JAX_KVCACHE_FFI_ASCEND_CANN_H_
