// Owns the choice of the kernel: the machine's instruction set, and the pointers of a call.
#include "kernel.h"

#include <cstdlib>
#include <cstring>

#include "kernel_variant.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace jax_kvcache {
namespace {

#if defined(__x86_64__)
// Part of every CPU with AVX2 that is known, but a bit of its own.
bool HasF16c() {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

Simd ChooseSimd() {
  const char* wanted = std::getenv("JAX_KVCACHE_SIMD");
  Simd best = Simd::kBaseline;
  for (int i = 0; i < static_cast<int>(Simd::kCount); ++i) {
    const Simd simd = static_cast<Simd>(i);
    if (!SimdSupported(simd)) continue;
    if (wanted != nullptr && std::strcmp(wanted, SimdName(simd)) == 0) return simd;
    best = simd;
  }
  return best;
}

}  // namespace

const char* SimdName(Simd simd) {
  switch (simd) {
    case Simd::kAvx2:
      return "avx2";
    case Simd::kAvx512:
      return "avx512";
    default:
      return "baseline";
  }
}

bool SimdSupported(Simd simd) {
#if defined(__x86_64__)
  switch (simd) {
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

Simd ActiveSimd() {
  static const Simd active = ChooseSimd();
  return active;
}

Kernel SelectKernel([[maybe_unused]] Simd simd, const Shape& shape) {
#if defined(__x86_64__)
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
