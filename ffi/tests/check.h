// Owns what the tests compare results with and report failures with.
#ifndef JAX_KVCACHE_FFI_TESTS_CHECK_H_
#define JAX_KVCACHE_FFI_TESTS_CHECK_H_

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "tests/owned_tensor.h"

namespace jax_kvcache {

[[noreturn]] inline void Fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

inline void Check(bool ok, const std::string& what) {
  if (!ok) Fail(what);
}

// The element's bits. All NaN have the same; float32 and bfloat16 subnormals, which a thread's mode
// may flush to zero, count as zero.
inline uint32_t CanonicalBits(const OwnedTensor& t, size_t i) {
  switch (t.dtype()) {
    case DType::kS8:
      return t.Get<uint8_t>(i);
    case DType::kF16: {
      const uint16_t bits = t.Get<uint16_t>(i);
      return (bits & 0x7FFF) > 0x7C00 ? 0x7E00 : bits;
    }
    case DType::kBF16: {
      const uint16_t bits = t.Get<uint16_t>(i);
      if ((bits & 0x7F80) == 0) return bits & 0x8000;
      return (bits & 0x7FFF) > 0x7F80 ? 0x7FC0 : bits;
    }
    default: {
      const uint32_t bits = t.Get<uint32_t>(i);
      if ((bits & 0x7F800000) == 0) return bits & 0x80000000;
      return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC00000 : bits;
    }
  }
}

constexpr uint64_t kEmptyHash = 14695981039346656037ULL;

// FNV-1a over the elements' canonical bits, continuing from `hash`.
inline uint64_t Hash(const OwnedTensor& t, uint64_t hash) {
  for (size_t i = 0; i < t.Count(); ++i) hash = (hash ^ CanonicalBits(t, i)) * 1099511628211ULL;
  return hash;
}

inline void CheckSame(const OwnedTensor& got, const OwnedTensor& expected,
                      const std::string& where) {
  Check(got.Count() == expected.Count(), where + ": another number of elements");
  for (size_t i = 0; i < got.Count(); ++i) {
    if (CanonicalBits(got, i) == CanonicalBits(expected, i)) continue;
    Fail(where + "[" + std::to_string(i) + "]: expected " +
         std::to_string(CanonicalBits(expected, i)) + ", got " +
         std::to_string(CanonicalBits(got, i)));
  }
}

}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_TESTS_CHECK_H_
