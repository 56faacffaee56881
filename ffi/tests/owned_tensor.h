// Owns the arrays of the tests: a tensor together with its memory, and random values for it.
#ifndef JAX_KVCACHE_FFI_TESTS_OWNED_TENSOR_H_
#define JAX_KVCACHE_FFI_TESTS_OWNED_TENSOR_H_

#include <cstdint>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "core/tensor.h"

namespace jax_kvcache {

// Has exactly as many bytes of heap memory as the array, so that a sanitizer sees every overrun.
class OwnedTensor {
 public:
  void Reset(DType dtype, std::vector<int64_t> dims) {
    dims_ = std::move(dims);
    dtype_ = dtype;
    size_t count = 1;
    for (const int64_t dim : dims_) count *= static_cast<size_t>(dim);
    bytes_.assign(count * static_cast<size_t>(ItemSize(dtype)), 0);
    bytes_.shrink_to_fit();
  }

  size_t Count() const { return bytes_.size() / static_cast<size_t>(ItemSize(dtype_)); }
  DType dtype() const { return dtype_; }
  const std::vector<int64_t>& dims() const { return dims_; }
  std::vector<uint8_t>& bytes() { return bytes_; }

  template <typename T>
  T Get(size_t i) const {
    T value;
    std::memcpy(&value, bytes_.data() + i * sizeof(T), sizeof(T));
    return value;
  }
  template <typename T>
  void Set(size_t i, T value) {
    std::memcpy(bytes_.data() + i * sizeof(T), &value, sizeof(T));
  }

  Tensor View() {
    return {bytes_.empty() ? nullptr : bytes_.data(), dims_.data(),
            static_cast<int64_t>(dims_.size()), dtype_};
  }

 private:
  std::vector<int64_t> dims_;
  std::vector<uint8_t> bytes_;
  DType dtype_ = DType::kF32;
};

// This generator gives the same numbers everywhere. The standard library's distributions do not, so
// the tests have their own.
using Random = std::mt19937;

// An integer in [0, bound).
inline int64_t Below(Random& random, int64_t bound) {
  return static_cast<int64_t>(random() % static_cast<uint32_t>(bound));
}

inline float Uniform(Random& random, float low, float high) {
  return low + (high - low) * (static_cast<float>(random() >> 8) * 0x1p-24f);
}

// Fills with values in [low, high), or in the case of float16 with values of any size below 2. With
// `any_bits`, one in eight has random bits. There are no subnormal float32 or bfloat16 values,
// whose results are not specified.
inline void FillFloats(Random& random, OwnedTensor* t, float low, float high, bool any_bits) {
  for (size_t i = 0; i < t->Count(); ++i) {
    float value = Uniform(random, low, high);
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof(bits));
    const bool use_random_bits = any_bits && Below(random, 8) == 0;
    if (t->dtype() == DType::kF32) {
      if (use_random_bits) bits = random();
      if ((bits & 0x7F800000U) == 0) bits &= 0x80000000U;
      t->Set(i, bits);
    } else if (t->dtype() == DType::kBF16) {
      uint16_t half = static_cast<uint16_t>(use_random_bits ? random() : bits >> 16);
      if ((half & 0x7F80U) == 0) half &= 0x8000U;
      t->Set(i, half);
    } else {
      const uint16_t half = static_cast<uint16_t>(random());
      t->Set(i, use_random_bits ? half : static_cast<uint16_t>(half & 0xBFFFU));
    }
  }
}

}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_TESTS_OWNED_TENSOR_H_
