// Owns the table of element types and the text of dimensions.
#include "core/tensor.h"

namespace jax_kvcache {
namespace {

struct NumberedName {
  int number;
  const char* name;
};
// XLA's PrimitiveType numbers that a JAX user can produce.
constexpr NumberedName kDTypeNames[] = {
    {1, "bool"},     {2, "int8"},     {3, "int16"},      {4, "int32"},     {5, "int64"},
    {6, "uint8"},    {7, "uint16"},   {8, "uint32"},     {9, "uint64"},    {10, "float16"},
    {11, "float32"}, {12, "float64"}, {15, "complex64"}, {16, "bfloat16"}, {18, "complex128"},
};

}  // namespace

int64_t ItemSize(DType dtype) {
  switch (dtype) {
    case DType::kS8:
      return 1;
    case DType::kF16:
    case DType::kBF16:
      return 2;
    case DType::kS32:
    case DType::kF32:
      break;
  }
  return 4;
}

std::string DTypeName(DType dtype) {
  for (const NumberedName& entry : kDTypeNames) {
    if (entry.number == static_cast<int>(dtype)) return entry.name;
  }
  return "dtype " + std::to_string(static_cast<int>(dtype));
}

bool IsAbsent(const Tensor& t) { return t.rank == 1 && t.dims[0] == 0; }

std::string DimsText(const int64_t* dims, int64_t rank) {
  std::string text = "[";
  for (int64_t i = 0; i < rank; ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(dims[i]);
  }
  return text + "]";
}

}  // namespace jax_kvcache
