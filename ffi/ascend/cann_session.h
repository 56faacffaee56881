// Owns the objects of one call of CANN: makes them, destroys each exactly once, keeps what failed.
#ifndef JAX_KVCACHE_FFI_CANN_SESSION_H_
#define JAX_KVCACHE_FFI_CANN_SESSION_H_

#include <initializer_list>
#include <string>

#include "cann_binding.h"

namespace jax_kvcache::cann {

class Session {
 public:
  explicit Session(const Api& api) : api_(api) {}
  ~Session() { Close(); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Describes a dense row-major array; null if that fails, or anything did before.
  aclTensor* Tensor(const char* name, DataType dtype, std::initializer_list<int64_t> dims,
                    void* data);
  aclIntArray* IntArray(const char* name, std::initializer_list<int64_t> values);

  // Takes the executor that GetWorkspaceSize made; Launch hands it to CANN, which frees it.
  void Own(aclOpExecutor* executor) { executor_ = executor; }
  void Launch(void* workspace, uint64_t workspace_size, Stream stream);

  // Remembers a failed `call`; the first one decides whose fault it is.
  void Note(const std::string& call, Status status);

  // Destroys everything.  CANN has taken what it needs when a launch returns, so this does not
  // wait for the device.
  void Close();

  bool ok() const { return error_.empty(); }
  const std::string& error() const { return error_; }
  bool callers_fault() const { return callers_fault_; }

 private:
  static constexpr int kMaxTensors = 16;  // 13 operands and 3 results
  static constexpr int kMaxRank = 4;      // of a cache

  void Fail(const std::string& what, const char* advice);

  const Api& api_;
  aclTensor* tensors_[kMaxTensors] = {};
  int num_tensors_ = 0;
  aclIntArray* array_ = nullptr;
  aclOpExecutor* executor_ = nullptr;
  std::string error_;
  bool callers_fault_ = false;
};

}  // namespace jax_kvcache::cann

#endif  // JAX_KVCACHE_FFI_CANN_SESSION_H_
