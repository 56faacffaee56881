// Owns the choice of the kernel: the machine's instruction set, and the pointers of a call.
#include "kernel.h"

#include <atomic>
#include <cstring>

#include "kernel_variant.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace jax_kvcache {
namespace {

#if defined(__x86_64__)
// Two bits that the compilers' __builtin_cpu_supports does not know everywhere.
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

Kernel SelectKernel([[maybe_unused]] Simd simd, const Shape& shape) {
#if defined(__x86_64__)
  if (simd == Simd::kAvx512Bf16) return SelectAvx512Bf16(shape);
  if (simd == Simd::kAvx512) return SelectAvx512(shape);
  if (simd == Simd::kAvx2) return SelectAvx2(shape);
#endif
  return SelectBaseline(shape);
}

Buffers ToBuffers(const Call& call, const Shape& shape) {
  const auto arg = [&](Arg i) { return call.args[i].data; };
  const auto floats = [&](Arg i, bool present) {
    return present ? static_cast<const float*>(call.args[i].data) : nullptr;
  };
  const bool quantized = shape.x == DType::kS32;
  const auto ret = [&](Ret i, bool present) { return present ? call.rets[i].data : nullptr; };
  return {arg(kX),
          arg(kCos),
          arg(kSin),
          static_cast<int8_t*>(arg(kKCache)),
          static_cast<int8_t*>(arg(kVCache)),
          static_cast<const int32_t*>(arg(kSlots)),
          floats(kScaleK, true),
          floats(kScaleV, true),
          floats(kOffsetK, shape.has_offset),
          floats(kOffsetV, shape.has_offset),
          floats(kWeightScale, quantized),
          floats(kActivationScale, shape.has_activation_scale),
          shape.has_bias ? arg(kBias) : nullptr,
          ret(kQOut, true),
          ret(kKOut, shape.kv_output),
          ret(kVOut, shape.kv_output)};
}

}  // namespace jax_kvcache
