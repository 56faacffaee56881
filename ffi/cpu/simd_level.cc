// Owns the questions to the processor about its instruction sets.
#include "cpu/simd_level.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace jax_kvcache {
namespace {

#if defined(__x86_64__)
// Not every supported compiler's __builtin_cpu_supports knows these two features.
bool HasF16c() {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

bool HasAvx512Bf16() {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & (1U << 5)) != 0;
}
#endif

Simd BestSimd() {
  Simd best = Simd::kBaseline;
  for (int i = 0; i < static_cast<int>(Simd::kCount); ++i) {
    if (SimdSupported(static_cast<Simd>(i))) best = static_cast<Simd>(i);
  }
  return best;
}

std::atomic<Simd>& Active() {
  static std::atomic<Simd> active = BestSimd();
  return active;
}

}  // namespace

const char* SimdName(Simd simd) {
  switch (simd) {
    case Simd::kAvx2:
      return "avx2";
    case Simd::kAvx512:
      return "avx512";
    case Simd::kAvx512Bf16:
      return "avx512_bf16";
    default:
      return "baseline";
  }
}

bool SimdSupported(Simd simd) {
#if defined(__x86_64__)
  switch (simd) {
    case Simd::kAvx512Bf16:
      return SimdSupported(Simd::kAvx512) && HasAvx512Bf16();
    case Simd::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && HasF16c();
    case Simd::kAvx2:
      return __builtin_cpu_supports("avx2") && HasF16c();
    default:
      break;
  }
#endif
  return simd == Simd::kBaseline;
}

Simd ActiveSimd() { return Active().load(std::memory_order_relaxed); }

bool UseSimd(const char* name) {
  for (int i = 0; i < static_cast<int>(Simd::kCount); ++i) {
    const Simd simd = static_cast<Simd>(i);
    if (std::strcmp(name, SimdName(simd)) != 0 || !SimdSupported(simd)) continue;
    Active().store(simd, std::memory_order_relaxed);
    return true;
  }
  return false;
}

}  // namespace jax_kvcache
