// Owns how the shared checks are made.
#include "core/checks.h"

#include <cstddef>

namespace jax_kvcache {
namespace {

bool IsOneOf(DType dtype, std::initializer_list<DType> allowed) {
  for (const DType candidate : allowed) {
    if (candidate == dtype) return true;
  }
  return false;
}

// "float16, bfloat16 or float32".
std::string DTypesText(std::initializer_list<DType> allowed) {
  std::string text;
  size_t left = allowed.size();
  for (const DType dtype : allowed) {
    text += DTypeName(dtype);
    --left;
    if (left > 0) text += left == 1 ? " or " : ", ";
  }
  return text;
}

}  // namespace

ExpectedShape WithGroups(const Groups& groups, const char* symbols,
                         std::initializer_list<int64_t> rest) {
  ExpectedShape shape = {symbols, {}, 0};
  for (int i = 0; i < groups.rank; ++i) shape.dims[shape.rank++] = groups.dims[i];
  for (const int64_t dim : rest) shape.dims[shape.rank++] = dim;
  return shape;
}

bool Checks::Fail(const char* name, const std::string& what) {
  error_ = std::string(operator_name_) + ": `" + name + "` " + what;
  return false;
}

bool Checks::FailShape(const char* name, const std::string& expected, const Tensor& got) {
  return Fail(name, "must have shape " + expected + ", got " + DimsText(got.dims, got.rank) + ".");
}

bool Checks::HasMemory(const char* name, const Tensor& t) {
  int64_t bytes = ItemSize(t.dtype);
  for (int64_t i = 0; i < t.rank; ++i) {
    if (t.dims[i] < 0) {
      return Fail(name, "has a negative dimension: " + DimsText(t.dims, t.rank) + ".");
    }
    if (__builtin_mul_overflow(bytes, t.dims[i], &bytes)) {
      return Fail(name, "is too large: " + DimsText(t.dims, t.rank) + ".");
    }
  }
  if (bytes > 0 && t.data == nullptr) return Fail(name, "has no memory.");
  return true;
}

bool Checks::HasNoEmptyDimension(const char* name, const Tensor& t) {
  for (int64_t i = 0; i < t.rank; ++i) {
    if (t.dims[i] == 0) {
      return Fail(name, "must have no dimension of size 0, got " + DimsText(t.dims, t.rank) + ".");
    }
  }
  return true;
}

bool Checks::HasDType(const char* name, const Tensor& t, std::initializer_list<DType> allowed) {
  if (IsOneOf(t.dtype, allowed)) return true;
  return Fail(name, "must have dtype " + DTypesText(allowed) + ", got " + DTypeName(t.dtype) + ".");
}

bool Checks::HasShape(const char* name, const Tensor& t, const ExpectedShape& expected) {
  bool same = t.rank == expected.rank;
  for (int64_t i = 0; same && i < t.rank; ++i) same = t.dims[i] == expected.dims[i];
  if (!same) {
    return FailShape(
        name, std::string(expected.symbols) + " = " + DimsText(expected.dims, expected.rank), t);
  }
  return HasNoEmptyDimension(name, t);
}

bool Checks::HasParameterShape(const char* name, const Tensor& t, const ExpectedShape& expected,
                               const Groups& groups, uint32_t* mask) {
  bool same = t.rank == expected.rank;
  *mask = 0;
  for (int64_t i = 0; same && i < t.rank; ++i) {
    const bool is_group = i < groups.rank;
    const bool is_full = t.dims[i] == expected.dims[i];
    if (is_group && is_full && t.dims[i] != 1) *mask |= 1U << i;
    same = is_full || (is_group && t.dims[i] == 1);
  }
  if (same) return true;
  std::string text = std::string(expected.symbols) + " = " + DimsText(expected.dims, expected.rank);
  if (groups.rank > 0) text += " (or 1 for any of g')";
  return FailShape(name, text, t);
}

bool Checks::IsLike(const char* name, const Tensor& t, const char* of_name, const Tensor& of) {
  bool same = t.rank == of.rank && t.dtype == of.dtype;
  for (int64_t i = 0; same && i < of.rank; ++i) same = t.dims[i] == of.dims[i];
  if (same) return true;
  return Fail(name, std::string("must have the shape and dtype of `") + of_name + "`, " +
                        DimsText(of.dims, of.rank) + " " + DTypeName(of.dtype) + ", got " +
                        DimsText(t.dims, t.rank) + " " + DTypeName(t.dtype) + ".");
}

bool Checks::ReadGroups(const char* name, const Tensor& t, const char* symbols, int rest,
                        Groups* groups) {
  if (t.rank < rest || t.rank > kMaxGroupRank + rest) {
    return Fail(name, "must have rank " + std::to_string(rest) + " to " +
                          std::to_string(kMaxGroupRank + rest) + " (" + symbols + "), got rank " +
                          std::to_string(t.rank) + ".");
  }
  if (!HasNoEmptyDimension(name, t)) return false;
  groups->rank = static_cast<int>(t.rank) - rest;
  groups->count = 1;
  for (int i = 0; i < groups->rank; ++i) {
    groups->dims[i] = t.dims[i];
    groups->count *= t.dims[i];  // fits: the size in bytes was checked
  }
  return true;
}

}  // namespace jax_kvcache
