// Owns what the tests compare and report with.
#ifndef JAX_KVCACHE_FFI_TESTS_CHECK_H_
#define JAX_KVCACHE_FFI_TESTS_CHECK_H_

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "random_call.h"

namespace jax_kvcache {

[[noreturn]] inline void Fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

inline void Check(bool ok, const std::string& what) {
  if (!ok) Fail(what);
}

// The element's bits, with one pattern for every NaN.
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
      // Subnormals may have been flushed.
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

template <typename Visit>
void VisitResults(const RandomCall& call, const Visit& visit) {
  for (int i = 0; i < 3; ++i) visit(kRetNames[i], call.rets[i]);
  visit("k_cache", call.args[kKCache]);
  visit("v_cache", call.args[kVCache]);
}

// FNV-1a over all results.
inline uint64_t Hash(const RandomCall& call, uint64_t hash = 14695981039346656037ULL) {
  VisitResults(call, [&](const char*, const OwnedTensor& t) {
    for (size_t i = 0; i < t.Count(); ++i) hash = (hash ^ CanonicalBits(t, i)) * 1099511628211ULL;
  });
  return hash;
}

inline void CheckSame(const RandomCall& got, const RandomCall& expected, const std::string& where) {
  const OwnedTensor* tensors[5] = {};
  int n = 0;
  VisitResults(expected, [&](const char*, const OwnedTensor& t) { tensors[n++] = &t; });
  n = 0;
  VisitResults(got, [&](const char* name, const OwnedTensor& t) {
    const OwnedTensor& e = *tensors[n++];
    for (size_t i = 0; i < t.Count(); ++i) {
      if (CanonicalBits(t, i) == CanonicalBits(e, i)) continue;
      Fail(where + ": " + name + "[" + std::to_string(i) + "]: expected " +
           std::to_string(CanonicalBits(e, i)) + ", got " + std::to_string(CanonicalBits(t, i)));
    }
  });
}

}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_TESTS_CHECK_H_
