// Owns the table of aclnn status codes.
#include "ascend/cann_status.h"

namespace jax_kvcache::cann {
namespace {

struct Entry {
  Status status;
  const char* name;
  const char* advice;
};

constexpr Entry kEntries[] = {
    {kParamNullptr, "ACLNN_ERR_PARAM_NULLPTR",
     "This release of CANN requires an argument that was not given: compare its documentation of "
     "aclnnDequantRopeQuantKvcache, or use implementation=\"xla\"."},
    {kParamInvalid, "ACLNN_ERR_PARAM_INVALID",
     "This release of CANN refuses a dtype or a shape of the call: its message says which; "
     "implementation=\"xla\" runs the call without the operator."},
    {kRuntimeError, "ACLNN_ERR_RUNTIME_ERROR",
     "The NPU runtime failed: check the device with `npu-smi info`, and rerun with "
     "ASCEND_GLOBAL_LOG_LEVEL=1 and ASCEND_SLOG_PRINT_TO_STDOUT=1 to see its log."},
    {kInner, "ACLNN_ERR_INNER", ""},
    {kInnerInferShape, "ACLNN_ERR_INNER_INFERSHAPE_ERROR", ""},
    {kInnerTiling, "ACLNN_ERR_INNER_TILING_ERROR", ""},
    {kInnerFindKernel, "ACLNN_ERR_INNER_FIND_KERNEL_ERROR",
     "CANN has no kernel of the operator for this chip: it needs Atlas A2, 800I A2 or A3, and "
     "the kernels package of the toolkit's own release."},
    {kInnerCreateExecutor, "ACLNN_ERR_INNER_CREATE_EXECUTOR", ""},
    {kInnerNotTransExecutor, "ACLNN_ERR_INNER_NOT_TRANS_EXECUTOR", ""},
    {kInnerNullptr, "ACLNN_ERR_INNER_NULLPTR", ""},
    {kInnerOppPathNotFound, "ACLNN_ERR_INNER_OPP_PATH_NOT_FOUND",
     "CANN does not find its operators: run `source set_env.sh` of the toolkit, which sets "
     "ASCEND_OPP_PATH, before Python."},
    {kInnerOppKernelPkgNotFound, "ACLNN_ERR_INNER_OPP_KERNEL_PKG_NOT_FOUND",
     "CANN's kernels package for this chip is not installed: install the Ascend-cann-kernels "
     "package of the toolkit's own release."},
};

const Entry* Find(Status status) {
  for (const Entry& entry : kEntries) {
    if (entry.status == status) return &entry;
  }
  return nullptr;
}

}  // namespace

const char* StatusName(Status status) {
  const Entry* entry = Find(status);
  return entry == nullptr ? "unknown status" : entry->name;
}

const char* StatusAdvice(Status status) {
  const Entry* entry = Find(status);
  return entry == nullptr ? "" : entry->advice;
}

bool IsCallersFault(Status status) { return status / 10000 == 16; }

}  // namespace jax_kvcache::cann
