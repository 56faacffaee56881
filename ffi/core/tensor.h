// Owns the description of an array whose memory somebody else owns, its element types, and how
// error messages write both.
#ifndef JAX_KVCACHE_FFI_CORE_TENSOR_H_
#define JAX_KVCACHE_FFI_CORE_TENSOR_H_

#include <cstdint>
#include <string>

namespace jax_kvcache {

// Element types, with XLA's numbers, so that reading XLA's type is a cast. A DType may hold a
// number that is not listed here: a type that no operand may have, which the checks refuse.
enum class DType : uint8_t { kS8 = 2, kS32 = 4, kF16 = 10, kF32 = 11, kBF16 = 16 };

// Bytes of one element; 4 for a type that is not listed.
int64_t ItemSize(DType dtype);

// "float16", or "dtype 12" for a number whose name is not known here.
std::string DTypeName(DType dtype);

// A dense row-major array. It owns neither the elements nor the dimensions.
struct Tensor {
  void* data = nullptr;
  const int64_t* dims = nullptr;
  int64_t rank = 0;
  DType dtype = DType::kF32;
};

// Whether an optional array is left out: it is then passed with shape [0].
bool IsAbsent(const Tensor& t);

// "[2, 8, 128]".
std::string DimsText(const int64_t* dims, int64_t rank);

}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_CORE_TENSOR_H_
