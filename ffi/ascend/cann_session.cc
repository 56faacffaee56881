// Owns how a session creates and destroys CANN's objects.
#include "ascend/cann_session.h"

#include <atomic>

#include "ascend/cann_status.h"

namespace jax_kvcache::cann {

aclTensor* Session::Tensor(const char* name, DataType dtype, std::initializer_list<int64_t> dims,
                           void* data) {
  if (!ok()) return nullptr;
  const int rank = static_cast<int>(dims.size());
  if (rank > kMaxRank || num_tensors_ == kMaxTensors) {
    Fail(std::string("`") + name + "` does not fit a session", "");
    return nullptr;
  }
  int64_t strides[kMaxRank] = {};  // in elements
  int64_t stride = 1;
  for (int i = rank - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= dims.begin()[i];
  }
  aclTensor* tensor = api_.create_tensor(dims.begin(), rank, dtype, strides, 0, kFormatNd,
                                         dims.begin(), rank, data);
  if (tensor == nullptr) {
    Fail(std::string("aclCreateTensor(`") + name + "`) returned null", "");
  } else {
    tensors_[num_tensors_++] = tensor;
  }
  return tensor;
}

aclIntArray* Session::IntArray(const char* name, std::initializer_list<int64_t> values) {
  if (!ok()) return nullptr;
  array_ = api_.create_int_array(values.begin(), values.size());
  if (array_ == nullptr) Fail(std::string("aclCreateIntArray(`") + name + "`) returned null", "");
  return array_;
}

void Session::Launch(void* workspace, uint64_t workspace_size, Stream stream) {
  aclOpExecutor* const executor = executor_;
  executor_ = nullptr;  // the launch frees the executor, also if it fails
  Note("aclnnDequantRopeQuantKvcache", api_.launch(workspace, workspace_size, executor, stream));
}

void Session::Close() {
  if (executor_ != nullptr) DestroyExecutor();
  if (array_ != nullptr) {
    Note("aclDestroyIntArray", api_.destroy_int_array(array_));
    array_ = nullptr;
  }
  while (num_tensors_ > 0) {
    Note("aclDestroyTensor", api_.destroy_tensor(tensors_[--num_tensors_]));
  }
}

void Session::DestroyExecutor() {
  aclOpExecutor* const executor = executor_;
  executor_ = nullptr;
  if (api_.set_executor_repeatable != nullptr && api_.destroy_executor != nullptr) {
    // CANN's documentation allows a caller to destroy an executor only after making it repeatable.
    Note("aclSetAclOpExecutorRepeatable", api_.set_executor_repeatable(executor));
    Note("aclDestroyAclOpExecutor", api_.destroy_executor(executor));
    return;
  }
  static std::atomic<bool> said{false};
  if (!said.exchange(true)) {
    leak_ =
        " This release of CANN has no aclDestroyAclOpExecutor, so each such failure leaks one of "
        "its executors.";
  }
}

void Session::Note(const std::string& call, Status status) {
  if (status == kSuccess) return;
  if (ok()) callers_fault_ = IsCallersFault(status);
  Fail(call + " failed with " + std::to_string(status) + " (" + StatusName(status) + ")",
       StatusAdvice(status));
}

void Session::Fail(const std::string& what, const char* advice) {
  const char* recent = api_.get_recent_err_msg();
  error_ += (ok() ? "" : " Then ") + what;
  if (recent != nullptr && *recent != '\0') error_ += std::string(": ") + recent;
  if (error_.back() != '.') error_ += '.';
  if (*advice != '\0') error_ += std::string(" ") + advice;
}

}  // namespace jax_kvcache::cann
