// Owns the comparison of cann.h with CANN's own headers: this file compiles only if they agree.
#include <type_traits>

#include "acl/acl.h"
#include "aclnn/acl_meta.h"
#include "aclnnop/aclnn_dequant_rope_quant_kvcache.h"
#include "ascend/cann.h"

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

}  // namespace
