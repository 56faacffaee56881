// Owns the meaning of aclnn status codes: their names, who is at fault, what a user can do.
#ifndef JAX_KVCACHE_FFI_ASCEND_CANN_STATUS_H_
#define JAX_KVCACHE_FFI_ASCEND_CANN_STATUS_H_

#include "ascend/cann.h"

namespace jax_kvcache::cann {

// The codes of aclnn/opdev/op_errno.h that the messages know. cann_check.cc compares them with it.
constexpr Status kParamNullptr = 161001;
constexpr Status kParamInvalid = 161002;
constexpr Status kRuntimeError = 361001;
constexpr Status kInner = 561000;
constexpr Status kInnerInferShape = 561001;
constexpr Status kInnerTiling = 561002;
constexpr Status kInnerFindKernel = 561003;
constexpr Status kInnerCreateExecutor = 561101;
constexpr Status kInnerNotTransExecutor = 561102;
constexpr Status kInnerNullptr = 561103;
constexpr Status kInnerOppPathNotFound = 561107;
constexpr Status kInnerOppKernelPkgNotFound = 561112;

// "ACLNN_ERR_PARAM_INVALID", or "unknown status".
const char* StatusName(Status status);

// One sentence, or an empty string where there is nothing to say.
const char* StatusAdvice(Status status);

// True for codes 16xxxx, with which CANN refuses the arguments. Others are failures inside CANN.
bool IsCallersFault(Status status);

}  // namespace jax_kvcache::cann

#endif  // JAX_KVCACHE_FFI_ASCEND_CANN_STATUS_H_
