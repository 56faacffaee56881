// Owns a stand-in libopapi.so whose functions do nothing: what a call costs is then what its caller
// costs. It has all of CANN's functions that the handler looks for.
#include "acl/acl.h"
#include "aclnn/acl_meta.h"
#include "aclnnop/aclnn_dequant_rope_quant_kvcache.h"

namespace {

char object;  // its address stands for every object

}  // namespace

extern "C" {

aclTensor* aclCreateTensor(const int64_t*, uint64_t, aclDataType, const int64_t*, int64_t,
                           aclFormat, const int64_t*, uint64_t, void*) {
  return reinterpret_cast<aclTensor*>(&object);
}

aclnnStatus aclDestroyTensor(const aclTensor*) { return 0; }

aclIntArray* aclCreateIntArray(const int64_t*, uint64_t) {
  return reinterpret_cast<aclIntArray*>(&object);
}

aclnnStatus aclDestroyIntArray(const aclIntArray*) { return 0; }

const char* aclGetRecentErrMsg() { return nullptr; }

aclnnStatus aclnnDequantRopeQuantKvcacheGetWorkspaceSize(
    const aclTensor*, const aclTensor*, const aclTensor*, aclTensor*, aclTensor*, const aclTensor*,
    const aclTensor*, const aclTensor*, const aclTensor*, const aclTensor*, const aclTensor*,
    const aclTensor*, const aclTensor*, const aclIntArray*, char*, char*, bool, char*,
    const aclTensor*, const aclTensor*, const aclTensor*, uint64_t* workspaceSize,
    aclOpExecutor** executor) {
  *workspaceSize = 16 << 20;
  *executor = reinterpret_cast<aclOpExecutor*>(&object);
  return 0;
}

aclnnStatus aclnnDequantRopeQuantKvcache(void*, uint64_t, aclOpExecutor*, aclrtStream) { return 0; }

}  // extern "C"
