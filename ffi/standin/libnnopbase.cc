// Owns the stand-in libnnopbase.so: tensor descriptors, integer arrays, and destroying executors.
#include "executor.h"
#include "ledger.h"
#include "objects.h"

namespace {

using standin::Ledger;

constexpr aclnnStatus kInnerNullptr = 561103;

// Frees the object also if a failure was injected.
template <typename T>
aclnnStatus Destroy(const char* function, const char* kind, T* object) {
  const int32_t injected = Ledger::Get().Enter(function);
  if (object == nullptr) return injected;
  if (!Ledger::Get().Destroyed(kind, object)) return kInnerNullptr;
  delete object;
  return injected;
}

}  // namespace

extern "C" aclTensor* aclCreateTensor(const int64_t* viewDims, uint64_t viewDimsNum,
                                      aclDataType dataType, const int64_t* stride, int64_t offset,
                                      aclFormat format, const int64_t* storageDims,
                                      uint64_t storageDimsNum, void* tensorData) {
  if (Ledger::Get().Enter("aclCreateTensor") != 0) return nullptr;
  if ((viewDims == nullptr && viewDimsNum > 0) || (storageDims == nullptr && storageDimsNum > 0)) {
    return nullptr;
  }
  auto* const tensor = new aclTensor{{viewDims, viewDims + viewDimsNum},
                                     {stride, stride + viewDimsNum},
                                     {storageDims, storageDims + storageDimsNum},
                                     static_cast<int>(dataType),
                                     static_cast<int>(format),
                                     offset,
                                     tensorData};
  Ledger::Get().Created("tensor", tensor);
  return tensor;
}

extern "C" aclnnStatus aclDestroyTensor(const aclTensor* tensor) {
  return Destroy("aclDestroyTensor", "tensor", tensor);
}

extern "C" aclIntArray* aclCreateIntArray(const int64_t* value, uint64_t size) {
  if (Ledger::Get().Enter("aclCreateIntArray") != 0) return nullptr;
  auto* const array = new aclIntArray{{value, value + size}};
  Ledger::Get().Created("int_array", array);
  return array;
}

extern "C" aclnnStatus aclDestroyIntArray(const aclIntArray* array) {
  return Destroy("aclDestroyIntArray", "int_array", array);
}

// Releases of CANN before 8.0 are not known to have these two; testing/build.py compiles this file
// also without them.
#ifndef STANDIN_WITHOUT_EXECUTOR_FUNCTIONS
extern "C" aclnnStatus aclSetAclOpExecutorRepeatable(aclOpExecutor* executor) {
  const int32_t injected = Ledger::Get().Enter("aclSetAclOpExecutorRepeatable");
  if (!Ledger::Get().IsAlive("executor", executor)) {
    Ledger::Get().Fault("made an executor repeatable that is not alive");
    return kInnerNullptr;
  }
  executor->asked_to_be_repeatable = true;
  if (injected != 0) return injected;
  executor->repeatable = true;
  return 0;
}

// CANN documents the two calls as a pair: a second one without a first is a fault.
extern "C" aclnnStatus aclDestroyAclOpExecutor(aclOpExecutor* executor) {
  if (Ledger::Get().IsAlive("executor", executor) && !executor->asked_to_be_repeatable) {
    Ledger::Get().Fault("destroyed an executor without making it repeatable first");
  }
  return Destroy("aclDestroyAclOpExecutor", "executor", executor);
}
#endif
