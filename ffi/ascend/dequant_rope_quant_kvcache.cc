// Owns the Ascend handler of dequant_rope_quant_kvcache: one call of CANN's operator on XLA's
// buffers, in place and enqueued on XLA's stream. The host neither reads nor writes device memory,
// and does not wait for the device.
#include "core/dequant_rope_quant_kvcache.h"

#include <optional>
#include <utility>

#include "ascend/cann_binding.h"
#include "ascend/cann_session.h"
#include "ascend/metadata.h"
#include "ascend/scratch.h"
#include "core/xla_call.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {
namespace {

namespace ffi = xla::ffi;

// CANN asks for 32 bytes, and its own allocator gives 512.
constexpr size_t kWorkspaceAlignment = 512;

std::optional<cann::DataType> AclDataType(DType dtype) {
  switch (dtype) {
    case DType::kS8:
      return cann::kInt8;
    case DType::kS32:
      return cann::kInt32;
    case DType::kF16:
      return cann::kFloat16;
    case DType::kF32:
      return cann::kFloat;
    case DType::kBF16:
      return cann::kBf16;
  }
  return std::nullopt;
}

ffi::Error Refuse(const std::string& what) {
  return ffi::Error::InvalidArgument(std::string(kOperator) + ": " + what);
}

// Refuses what CANN's operator cannot do. Python's lowering never asks for it, but another caller
// of the FFI target may.
ffi::Error CheckOperator(const Shape& shape) {
  if (shape.table_dtype == DType::kF32) {
    return Refuse("`cos` must have dtype float16 or bfloat16 on Ascend, got float32.");
  }
  if (!shape.SharesParameters()) {
    return Refuse(
        "scales, offsets and `bias` must be shared by all groups on Ascend, where the "
        "operator takes one of each.");
  }
  const int64_t groups = shape.groups.count;
  if (groups > INT32_MAX / shape.rows || groups > INT64_MAX / shape.tokens) {
    return Refuse("the caches must have at most 2147483647 rows in all on Ascend, got " +
                  std::to_string(groups) + " groups of " + std::to_string(shape.rows) + ".");
  }
  return ffi::Error::Success();
}

// Describes a checked call to CANN in page mode, with all groups as one, and asks for the size of
// its workspace. Only these descriptors are flat: no buffer is copied or reshaped.
uint64_t Describe(const cann::Api& api, const Call& call, const Shape& s, cann::Session* session) {
  const int64_t tokens = s.all_tokens();
  const int64_t fused_width = s.fused_width();
  const int64_t block = call.args[kKCache].dims[call.args[kKCache].rank - 3];
  const int64_t blocks = s.groups.count * s.rows / block;
  const auto arg = [&](Arg i, std::initializer_list<int64_t> dims) {
    return session->Tensor(kArgNames[i], *AclDataType(call.args[i].dtype), dims, call.args[i].data);
  };
  const auto optional_arg = [&](bool given, Arg i, std::initializer_list<int64_t> dims) {
    return given ? arg(i, dims) : nullptr;
  };
  const auto ret = [&](Ret i, std::initializer_list<int64_t> dims) {
    return session->Tensor(kRetNames[i], *AclDataType(s.table_dtype), dims, call.rets[i].data);
  };

  aclTensor* const x = arg(kX, {tokens, fused_width});
  aclTensor* const cos = arg(kCos, {tokens, s.head_dim});
  aclTensor* const sin = arg(kSin, {tokens, s.head_dim});
  aclTensor* const k_cache = arg(kKCache, {blocks, block, s.num_kv_heads, s.head_dim});
  aclTensor* const v_cache = arg(kVCache, {blocks, block, s.num_kv_heads, s.head_dim});
  aclTensor* const slots = arg(kSlots, {tokens});
  aclTensor* const scale_k = arg(kScaleK, {s.num_kv_heads, s.head_dim});
  aclTensor* const scale_v = arg(kScaleV, {s.num_kv_heads, s.head_dim});
  aclTensor* const offset_k = optional_arg(s.has_offset, kOffsetK, {s.num_kv_heads, s.head_dim});
  aclTensor* const offset_v = optional_arg(s.has_offset, kOffsetV, {s.num_kv_heads, s.head_dim});
  aclTensor* const weight_scale = optional_arg(s.x_is_accumulator(), kWeightScale, {fused_width});
  aclTensor* const activation_scale =
      optional_arg(s.has_activation_scale, kActivationScale, {tokens});
  aclTensor* const bias = optional_arg(s.has_bias, kBias, {fused_width});
  aclTensor* const q = ret(kQOut, {tokens, s.num_q_heads, s.head_dim});
  aclTensor* const k =
      s.kv_output ? ret(kKOut, {tokens, s.num_kv_heads, s.head_dim}) : ret(kKOut, {0});
  aclTensor* const v =
      s.kv_output ? ret(kVOut, {tokens, s.num_kv_heads, s.head_dim}) : ret(kVOut, {0});
  aclIntArray* const size_splits =
      session->IntArray("size_splits", {s.num_q_heads * s.head_dim, s.row_size(), s.row_size()});
  if (!session->ok()) return 0;

  // CANN takes these texts as char*, not const char*, so that each call needs copies of its own.
  char quant_mode[] = "static";
  char layout[] = "BSND";
  char cache_mode[] = "page";
  uint64_t workspace_size = 0;
  aclOpExecutor* executor = nullptr;
  const cann::Status status = api.get_workspace_size(
      x, cos, sin, k_cache, v_cache, slots, scale_k, scale_v, offset_k, offset_v, weight_scale,
      activation_scale, bias, size_splits, quant_mode, layout, s.kv_output, cache_mode, q, k, v,
      &workspace_size, &executor);
  session->Note("aclnnDequantRopeQuantKvcacheGetWorkspaceSize", status);
  if (session->ok()) session->Own(executor);
  return workspace_size;
}

// XLA deletes donated arrays also when the call fails, so that the message has to say so.
ffi::Error Failed(ffi::ErrorCode code, const std::string& what) {
  return ffi::Error(code, std::string(kOperator) + ": " + what +
                              " Caches donated to this call are deleted; others are unchanged.");
}

ffi::Error Run(cann::Stream stream, Scratch scratch, ffi::RemainingArgs args,
               ffi::RemainingRets rets, bool kv_output) {
  Call call;
  call.kv_output = kv_output;
  Shape shape;
  ffi::Error error = ReadCall(kOperator, args, rets, &call, &shape);
  if (error.failure()) return error;
  error = CheckOperator(shape);
  if (error.failure()) return error;

  const cann::Binding& binding = cann::Bind();
  if (!binding.ok) return Failed(ffi::ErrorCode::kFailedPrecondition, binding.text);

  cann::Session session(binding.api);
  const uint64_t workspace_size = Describe(binding.api, call, shape, &session);
  void* workspace = nullptr;
  if (session.ok() && workspace_size > 0) {
    workspace = scratch.Allocate(workspace_size, kWorkspaceAlignment);
  }
  if (session.ok() && scratch.error().empty()) session.Launch(workspace, workspace_size, stream);
  session.Close();
  if (!scratch.error().empty()) {
    return Failed(ffi::ErrorCode::kResourceExhausted,
                  "the operator's workspace of " + std::to_string(workspace_size) +
                      " bytes could not be allocated on the device (" + scratch.error() + ")." +
                      (session.ok() ? "" : " Then " + session.error()) + session.leak());
  }
  if (session.ok()) return ffi::Error::Success();
  return Failed(
      session.callers_fault() ? ffi::ErrorCode::kInvalidArgument : ffi::ErrorCode::kInternal,
      session.error());
}

}  // namespace
}  // namespace jax_kvcache::dequant_rope_quant_kvcache

JAX_KVCACHE_EXPORT XLA_FFI_Error* dequant_rope_quant_kvcache_ascend(XLA_FFI_CallFrame* call_frame);

XLA_FFI_Error* dequant_rope_quant_kvcache_ascend(XLA_FFI_CallFrame* call_frame) {
  if (jax_kvcache::AsksForMetadata(*call_frame)) return jax_kvcache::AnswerMetadata(call_frame);
  XLA_FFI_DEFINE_HANDLER(handler, jax_kvcache::dequant_rope_quant_kvcache::Run,
                         xla::ffi::Ffi::Bind()
                             .Ctx<xla::ffi::PlatformStream<jax_kvcache::cann::Stream>>()
                             .Ctx<jax_kvcache::Scratch>()
                             .RemainingArgs()
                             .RemainingRets()
                             .Attr<bool>("kv_output"));
  return (*handler)(call_frame);
}

// Looks for CANN. Returns 1 and sets `text` to the files found, or returns 0 and sets it to the
// reason.
JAX_KVCACHE_EXPORT int jax_kvcache_cann(const char** text) {
  const jax_kvcache::cann::Binding& binding = jax_kvcache::cann::Bind();
  *text = binding.text.c_str();
  return binding.ok ? 1 : 0;
}
