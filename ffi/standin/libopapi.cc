// Owns the stand-in libopapi.so: the operator's two calls.
#include "aclnnop/aclnn_dequant_rope_quant_kvcache.h"
#include "arithmetic.h"
#include "device.h"
#include "executor.h"
#include "ledger.h"
#include "validation.h"

namespace {

using standin::Ledger;

constexpr aclnnStatus kParamNullptr = 161001;
constexpr aclnnStatus kRuntimeError = 361001;
constexpr uint64_t kWorkspaceSize = 16 << 20;  // what the operator's tiling asks for

aclnnStatus Failed(aclnnStatus status, const std::string& message) {
  standin::SetRecentMessage(message);
  return status;
}

// Copies what the stream will need: the caller may destroy its descriptors when a launch returns.
bool Take(const aclOpExecutor& executor, standin::Launched* call) {
  call->kv_output = executor.kv_output;
  for (int i = 0; i < standin::kNumOperands; ++i) {
    const aclTensor* const tensor = executor.tensors[i];
    call->given[i] = tensor != nullptr;
    if (tensor == nullptr) continue;
    if (!Ledger::Get().IsAlive("tensor", tensor)) {
      Ledger::Get().Fault("launched with a destroyed descriptor");
      return false;
    }
    call->tensors[i] = *tensor;
  }
  return true;
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
  if (injected != 0) return injected;
  if (workspaceSize == nullptr || executor == nullptr) {
    return Failed(kParamNullptr, "EZ0000: workspaceSize or executor is null");
  }
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
  auto* const made = new aclOpExecutor{{}, kvOutput, false};
  for (int i = 0; i < standin::kNumOperands; ++i) made->tensors[i] = tensors[i];
  Ledger::Get().Created("executor", made);
  *workspaceSize = kWorkspaceSize;
  *executor = made;
  return 0;
}

// Frees the executor, also when it fails, unless it was made repeatable.
extern "C" aclnnStatus aclnnDequantRopeQuantKvcache(void* workspace, uint64_t workspaceSize,
                                                    aclOpExecutor* executor, aclrtStream stream) {
  const int32_t injected = Ledger::Get().Enter("aclnnDequantRopeQuantKvcache");
  if (!Ledger::Get().IsAlive("executor", executor)) {
    Ledger::Get().Fault("launched an executor that is not alive");
    return Failed(kParamNullptr, "EZ0000: executor is not alive");
  }
  standin::Launched call;
  const bool taken = Take(*executor, &call);
  if (!executor->repeatable) {
    Ledger::Get().Destroyed("executor", executor);
    delete executor;
  }
  if (injected != 0) return injected;
  standin::Stream* const queue = standin::StreamFromHandle(stream);
  if (!taken || queue == nullptr || workspaceSize != kWorkspaceSize ||
      !standin::IsDeviceAddress(workspace)) {
    Ledger::Get().Fault("launched with a wrong stream, workspace or descriptor");
    return Failed(kRuntimeError, "EE9999: wrong stream, workspace or descriptor");
  }
  standin::Enqueue(queue, [call = std::move(call), workspace] {
    standin::Execute(call, static_cast<float*>(standin::ToHost(workspace)));
  });
  Ledger::Get().Count("launched");
  return 0;
}
