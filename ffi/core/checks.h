// Owns the checks of arrays that every operator makes, and the sentences that report them.
#ifndef JAX_KVCACHE_FFI_CORE_CHECKS_H_
#define JAX_KVCACHE_FFI_CORE_CHECKS_H_

#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/groups.h"
#include "core/tensor.h"

namespace jax_kvcache {

// The shape that an array must have: `symbols` as error messages write it, "[*g, T, D]", and its
// dimensions in this call.
struct ExpectedShape {
  static constexpr int kMaxRank = kMaxGroupRank + 4;

  const char* symbols;
  int64_t dims[kMaxRank];
  int64_t rank;
};

// The shape that begins with the group dimensions and ends with `rest`, at most four dimensions.
ExpectedShape WithGroups(const Groups& groups, const char* symbols,
                         std::initializer_list<int64_t> rest);

// Each check returns whether the array passes. The first one that fails sets the error; the caller
// then makes no further check.
class Checks {
 public:
  explicit Checks(const char* operator_name) : operator_name_(operator_name) {}

  // "OPERATOR: `NAME` must ..., got ...", or an empty string.
  const std::string& error() const { return error_; }

  // Sets the error and returns false. `what` continues the sentence that begins with the name.
  bool Fail(const char* name, const std::string& what);
  bool FailShape(const char* name, const std::string& expected, const Tensor& got);

  // No dimension is negative, the size in bytes fits int64_t, and there is memory if it is not 0.
  bool HasMemory(const char* name, const Tensor& t);

  bool HasNoEmptyDimension(const char* name, const Tensor& t);

  bool HasDType(const char* name, const Tensor& t, std::initializer_list<DType> allowed);

  // Exactly this shape, none of it empty.
  bool HasShape(const char* name, const Tensor& t, const ExpectedShape& expected);

  // As HasShape, except that a group dimension may also be 1. Sets `mask` as
  // Groups::ParameterBlock reads it.
  bool HasParameterShape(const char* name, const Tensor& t, const ExpectedShape& expected,
                         const Groups& groups, uint32_t* mask);

  // The shape and the dtype of the array `of`.
  bool IsLike(const char* name, const Tensor& t, const char* of_name, const Tensor& of);

  // Reads the group dimensions, which are those before the last `rest` ones of an array that
  // `symbols` describes.
  bool ReadGroups(const char* name, const Tensor& t, const char* symbols, int rest, Groups* groups);

 private:
  const char* operator_name_;
  std::string error_;
};

}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_CORE_CHECKS_H_
