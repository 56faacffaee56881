// Owns the choice of the kernel's variant.
#include "cpu/dequant_rope_quant_kvcache_kernel.h"

#include "cpu/dequant_rope_quant_kvcache_kernel_variant.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {

Kernel SelectKernel([[maybe_unused]] Simd simd, const Shape& shape) {
#if defined(__x86_64__)
  if (simd == Simd::kAvx512Bf16) return SelectAvx512Bf16(shape);
  if (simd == Simd::kAvx512) return SelectAvx512(shape);
  if (simd == Simd::kAvx2) return SelectAvx2(shape);
#endif
  return SelectBaseline(shape);
}

}  // namespace jax_kvcache::dequant_rope_quant_kvcache
