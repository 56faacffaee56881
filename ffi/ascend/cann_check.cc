// Owns the comparison of cann.h with CANN's own headers: this file compiles only if they agree.
#include <type_traits>

#include "acl/acl.h"
#include "aclnn/acl_meta.h"
#include "aclnnop/aclnn_dequant_rope_quant_kvcache.h"
#include "ascend/cann.h"
#include "ascend/cann_status.h"
#if __has_include("aclnn/opdev/op_errno.h")
#include "aclnn/opdev/op_errno.h"
#endif

namespace {

namespace cann = jax_kvcache::cann;

// Two differences do not matter to a caller and are ignored: an enum, which C passes as int, and
// const behind a pointer, in which releases of CANN differ.
template <typename T>
struct Plain {
  using type = std::conditional_t<std::is_enum_v<T>, int, T>;
};
template <typename T>
struct Plain<const T*> {
  using type = T*;
};
template <typename T>
struct Signature;
template <typename R, typename... Args>
struct Signature<R(Args...)> {
  using type = typename Plain<R>::type(typename Plain<Args>::type...);
};

template <typename Theirs, typename Ours>
constexpr bool kSame =
    std::is_same_v<typename Signature<Theirs>::type, typename Signature<Ours>::type>;

static_assert(kSame<decltype(aclCreateTensor), cann::CreateTensorFn>);
static_assert(kSame<decltype(aclDestroyTensor), cann::DestroyTensorFn>);
static_assert(kSame<decltype(aclCreateIntArray), cann::CreateIntArrayFn>);
static_assert(kSame<decltype(aclDestroyIntArray), cann::DestroyIntArrayFn>);
static_assert(kSame<decltype(aclSetAclOpExecutorRepeatable), cann::SetExecutorRepeatableFn>);
static_assert(kSame<decltype(aclDestroyAclOpExecutor), cann::DestroyExecutorFn>);
static_assert(
    kSame<decltype(aclnnDequantRopeQuantKvcacheGetWorkspaceSize), cann::GetWorkspaceSizeFn>);
static_assert(kSame<decltype(aclnnDequantRopeQuantKvcache), cann::LaunchFn>);
static_assert(kSame<decltype(aclGetRecentErrMsg), cann::GetRecentErrMsgFn>);

static_assert(sizeof(aclDataType) == sizeof(int) && sizeof(aclFormat) == sizeof(int));
static_assert(static_cast<int>(ACL_FLOAT) == cann::kFloat);
static_assert(static_cast<int>(ACL_FLOAT16) == cann::kFloat16);
static_assert(static_cast<int>(ACL_INT8) == cann::kInt8);
static_assert(static_cast<int>(ACL_INT32) == cann::kInt32);
static_assert(static_cast<int>(ACL_BF16) == cann::kBf16);
static_assert(static_cast<int>(ACL_FORMAT_ND) == cann::kFormatNd);

// Not every package of headers has the status codes.
#if __has_include("aclnn/opdev/op_errno.h")
static_assert(ACLNN_SUCCESS == cann::kSuccess);
static_assert(ACLNN_ERR_PARAM_NULLPTR == cann::kParamNullptr);
static_assert(ACLNN_ERR_PARAM_INVALID == cann::kParamInvalid);
static_assert(ACLNN_ERR_RUNTIME_ERROR == cann::kRuntimeError);
static_assert(ACLNN_ERR_INNER == cann::kInner);
static_assert(ACLNN_ERR_INNER_INFERSHAPE_ERROR == cann::kInnerInferShape);
static_assert(ACLNN_ERR_INNER_TILING_ERROR == cann::kInnerTiling);
static_assert(ACLNN_ERR_INNER_FIND_KERNEL_ERROR == cann::kInnerFindKernel);
static_assert(ACLNN_ERR_INNER_CREATE_EXECUTOR == cann::kInnerCreateExecutor);
static_assert(ACLNN_ERR_INNER_NOT_TRANS_EXECUTOR == cann::kInnerNotTransExecutor);
static_assert(ACLNN_ERR_INNER_NULLPTR == cann::kInnerNullptr);
static_assert(ACLNN_ERR_INNER_OPP_PATH_NOT_FOUND == cann::kInnerOppPathNotFound);
static_assert(ACLNN_ERR_INNER_OPP_KERNEL_PKG_NOT_FOUND == cann::kInnerOppKernelPkgNotFound);
#endif

}  // namespace
