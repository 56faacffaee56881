// Owns the stand-in libopapi.so: the operator's two calls.
#include "aclnnop/aclnn_dequant_rope_quant_kvcache.h"
#include "dequant_rope_quant_kvcache.h"
#include "device.h"
#include "executor.h"
#include "ledger.h"
#include "validation.h"

namespace {

using standin::Ledger;

constexpr aclnnStatus kParamNullptr = 161001;
constexpr aclnnStatus kRuntimeError = 361001;
constexpr uint64_t kWorkspaceSize = 16 << 20;   // the size that the operator's tiling asks for
constexpr uintptr_t kWorkspaceAlignment = 512;  // what CANN's own allocator gives

// What the first call leaves in `*executor` when it fails. CANN leaves an executor of its pool
// there, which a caller must not touch: here every use is recorded as a fault, since it is not
// alive.
aclOpExecutor* FailedExecutor() {
  static aclOpExecutor* const executor = new aclOpExecutor{};
  return executor;
}

aclnnStatus Failed(aclnnStatus status, const std::string& message) {
  standin::SetRecentMessage(message);
  return status;
}

bool DescriptorsAreAlive(const aclOpExecutor& executor) {
  for (const aclTensor* const tensor : executor.tensors) {
    if (tensor != nullptr && !Ledger::Get().IsAlive("tensor", tensor)) {
      Ledger::Get().Fault("launched with a destroyed descriptor");
      return false;
    }
  }
  return true;
}

standin::Array ToArray(const aclTensor* tensor) {
  if (tensor == nullptr) return {};
  void* const data = standin::ToHost(tensor->data);
  switch (tensor->dtype) {
    case ACL_INT32:
      return {data, standin::Type::kInt32};
    case ACL_FLOAT16:
      return {data, standin::Type::kFloat16};
    case ACL_BF16:
      return {data, standin::Type::kBfloat16};
    default:
      return {data, standin::Type::kFloat32};
  }
}

// What the stream will need of the executor's descriptors, which the caller may destroy when the
// launch returns.
standin::ScalarCall ToScalarCall(const aclOpExecutor& executor) {
  const auto tensor = [&](standin::Operand i) { return executor.tensors[i]; };
  const auto array = [&](standin::Operand i) { return ToArray(executor.tensors[i]); };
  const std::vector<int64_t>& cache = tensor(standin::kKCache)->dims;  // [blocks, rows, Nkv, D]
  standin::ScalarCall call;
  call.tokens = tensor(standin::kX)->dims[0];
  call.rows = cache[0] * cache[1];
  call.num_kv_heads = cache[2];
  call.head_dim = cache[3];
  call.num_q_heads = tensor(standin::kX)->dims[1] / call.head_dim - 2 * call.num_kv_heads;
  call.x = array(standin::kX);
  call.cos = array(standin::kCos);
  call.sin = array(standin::kSin);
  call.k_cache = static_cast<int8_t*>(array(standin::kKCache).data);
  call.v_cache = static_cast<int8_t*>(array(standin::kVCache).data);
  call.slots = static_cast<const int32_t*>(array(standin::kIndices).data);
  call.scale_k = array(standin::kScaleK);
  call.scale_v = array(standin::kScaleV);
  if (tensor(standin::kOffsetK) != nullptr && tensor(standin::kOffsetV) != nullptr) {
    call.offset_k = array(standin::kOffsetK);
    call.offset_v = array(standin::kOffsetV);
  }
  call.weight_scale = array(standin::kWeightScale);
  call.activation_scale = array(standin::kActivationScale);
  call.bias = array(standin::kBias);
  call.q = array(standin::kQOut);
  if (executor.kv_output) {
    call.k = array(standin::kKOut);
    call.v = array(standin::kVOut);
  }
  return call;
}

// Runs on the stream. The published kernel does not test slots against the cache's end.
void Run(const standin::ScalarCall& call, void* workspace) {
  for (int64_t token = 0; token < call.tokens; ++token) {
    if (call.slots[token] >= call.rows) {
      Ledger::Get().Fault("slot " + std::to_string(call.slots[token]) + " is past the cache");
    }
  }
  auto* const begin = static_cast<uint8_t*>(standin::ToHost(workspace));
  begin[kWorkspaceSize - 1] = 0;  // the operator may use all of its workspace
  standin::Execute(call, reinterpret_cast<float*>(begin));
}

}  // namespace

extern "C" aclnnStatus aclnnDequantRopeQuantKvcacheGetWorkspaceSize(
    const aclTensor* x, const aclTensor* cos, const aclTensor* sin, aclTensor* kCacheRef,
    aclTensor* vCacheRef, const aclTensor* indices, const aclTensor* scaleK,
    const aclTensor* scaleV, const aclTensor* offsetKOptional, const aclTensor* offsetVOptional,
    const aclTensor* weightScaleOptional, const aclTensor* activationScaleOptional,
    const aclTensor* biasOptional, const aclIntArray* sizeSplits, char* quantModeOptional,
    char* layoutOptional, bool kvOutput, char* cacheModeOptional, const aclTensor* qOut,
    const aclTensor* kOut, const aclTensor* vOut, uint64_t* workspaceSize,
    aclOpExecutor** executor) {
  const int32_t injected = Ledger::Get().Enter("aclnnDequantRopeQuantKvcacheGetWorkspaceSize");
  if (workspaceSize == nullptr || executor == nullptr) {
    return Failed(kParamNullptr, "EZ0000: workspaceSize or executor is null");
  }
  *workspaceSize = kWorkspaceSize;
  *executor = FailedExecutor();
  if (injected != 0) return injected;
  const aclTensor* const tensors[standin::kNumOperands] = {x,
                                                           cos,
                                                           sin,
                                                           kCacheRef,
                                                           vCacheRef,
                                                           indices,
                                                           scaleK,
                                                           scaleV,
                                                           offsetKOptional,
                                                           offsetVOptional,
                                                           weightScaleOptional,
                                                           activationScaleOptional,
                                                           biasOptional,
                                                           qOut,
                                                           kOut,
                                                           vOut};
  const standin::Attributes attributes = {sizeSplits, quantModeOptional, layoutOptional,
                                          cacheModeOptional, kvOutput};
  Ledger::Get().SetDescriptors(standin::DescriptorsJson(tensors, attributes));
  std::string message;
  const aclnnStatus status = standin::CheckCall(tensors, attributes, &message);
  if (status != 0) return Failed(status, message);
  auto* const made = new aclOpExecutor{{}, kvOutput, false, false};
  for (int i = 0; i < standin::kNumOperands; ++i) made->tensors[i] = tensors[i];
  Ledger::Get().Created("executor", made);
  *executor = made;
  return 0;
}

// Frees the executor, also if it fails, unless the executor was made repeatable or there is no
// workspace of the right size, which CANN checks before it takes the executor back.
extern "C" aclnnStatus aclnnDequantRopeQuantKvcache(void* workspace, uint64_t workspaceSize,
                                                    aclOpExecutor* executor, aclrtStream stream) {
  const int32_t injected = Ledger::Get().Enter("aclnnDequantRopeQuantKvcache");
  if (!Ledger::Get().IsAlive("executor", executor)) {
    Ledger::Get().Fault("launched an executor that is not alive");
    return Failed(kParamNullptr, "EZ0000: executor is not alive");
  }
  if (workspace == nullptr || workspaceSize < kWorkspaceSize) {
    Ledger::Get().Fault("launched without a workspace of the size that was asked for");
    return Failed(kParamNullptr, "EZ0000: workspace is null or too small");
  }
  const bool alive = DescriptorsAreAlive(*executor);
  standin::ScalarCall call;
  if (alive) call = ToScalarCall(*executor);
  if (!executor->repeatable) {
    Ledger::Get().Destroyed("executor", executor);
    delete executor;
  }
  if (injected != 0) return injected;
  standin::Stream* const queue = standin::StreamFromHandle(stream);
  const bool aligned = reinterpret_cast<uintptr_t>(workspace) % kWorkspaceAlignment == 0;
  if (!alive || queue == nullptr || !aligned || !standin::IsScratch(workspace, workspaceSize)) {
    Ledger::Get().Fault("launched with a wrong stream, workspace or descriptor");
    return Failed(kRuntimeError, "EE9999: wrong stream, workspace or descriptor");
  }
  standin::Enqueue(queue, [call, workspace] { Run(call, workspace); });
  Ledger::Get().Count("launched");
  return 0;
}
