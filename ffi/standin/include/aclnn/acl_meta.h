// The stand-in toolkit's aclnn/acl_meta.h: descriptors and executors, as CANN documents them.
#ifndef JAX_KVCACHE_FFI_STANDIN_ACLNN_ACL_META_H_
#define JAX_KVCACHE_FFI_STANDIN_ACLNN_ACL_META_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct aclTensor aclTensor;
typedef struct aclIntArray aclIntArray;
typedef struct aclOpExecutor aclOpExecutor;
typedef int32_t aclnnStatus;

typedef enum {
  ACL_FLOAT = 0,
  ACL_FLOAT16 = 1,
  ACL_INT8 = 2,
  ACL_INT32 = 3,
  ACL_BF16 = 27
} aclDataType;
typedef enum { ACL_FORMAT_ND = 2 } aclFormat;

aclTensor* aclCreateTensor(const int64_t* viewDims, uint64_t viewDimsNum, aclDataType dataType,
                           const int64_t* stride, int64_t offset, aclFormat format,
                           const int64_t* storageDims, uint64_t storageDimsNum, void* tensorData);
aclnnStatus aclDestroyTensor(const aclTensor* tensor);
aclIntArray* aclCreateIntArray(const int64_t* value, uint64_t size);
aclnnStatus aclDestroyIntArray(const aclIntArray* array);
aclnnStatus aclSetAclOpExecutorRepeatable(aclOpExecutor* executor);
aclnnStatus aclDestroyAclOpExecutor(aclOpExecutor* executor);

#ifdef __cplusplus
}
#endif

#endif  // JAX_KVCACHE_FFI_STANDIN_ACLNN_ACL_META_H_
