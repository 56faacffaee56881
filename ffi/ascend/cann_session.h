// Owns the CANN objects of one call: it creates them, destroys each exactly once, and collects
// errors.
#ifndef JAX_KVCACHE_FFI_ASCEND_CANN_SESSION_H_
#define JAX_KVCACHE_FFI_ASCEND_CANN_SESSION_H_

#include <initializer_list>
#include <string>

#include "ascend/cann_binding.h"

namespace jax_kvcache::cann {

class Session {
 public:
  explicit Session(const Api& api) : api_(api) {}
  ~Session() { Close(); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Describes a dense row-major array. Returns null if that fails or if something failed before.
  aclTensor* Tensor(const char* name, DataType dtype, std::initializer_list<int64_t> dims,
                    void* data);
  aclIntArray* IntArray(const char* name, std::initializer_list<int64_t> values);

  // Takes over the executor that GetWorkspaceSize created. Launch passes it on to CANN, which frees
  // it.
  void Own(aclOpExecutor* executor) { executor_ = executor; }
  void Launch(void* workspace, uint64_t workspace_size, Stream stream);

  // Adds an error if `status` says that `call` failed. The first failure decides whether the caller
  // is at fault.
  void Note(const std::string& call, Status status);

  // Destroys everything. This does not wait for the device: when the launch returns, CANN no longer
  // needs the descriptors.
  void Close();

  bool ok() const { return error_.empty(); }
  const std::string& error() const { return error_; }
  bool callers_fault() const { return callers_fault_; }

  // One sentence, with a space before it, if Close could not free an executor. It is said once in a
  // process, and is empty afterwards.
  const std::string& leak() const { return leak_; }

 private:
  static constexpr int kMaxTensors = 16;  // 13 operands and 3 results
  static constexpr int kMaxRank = 4;      // a cache's

  void Fail(const std::string& what, const char* advice);
  void DestroyExecutor();

  const Api& api_;
  aclTensor* tensors_[kMaxTensors] = {};
  int num_tensors_ = 0;
  aclIntArray* array_ = nullptr;
  aclOpExecutor* executor_ = nullptr;
  std::string error_;
  std::string leak_;
  bool callers_fault_ = false;
};

}  // namespace jax_kvcache::cann

#endif  // JAX_KVCACHE_FFI_ASCEND_CANN_SESSION_H_
