// Owns the choice of the kernel's variant.
#include "cpu/dequant_rope_quant_kvcache_kernel.h"

#include "cpu/dequant_rope_quant_kvcache_kernel_variant.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {

Kernel SelectKernel([[maybe_unused]] Simd simd, const Shape& shape) {
#if defined(__x86_64__)
  // This instruction set has an instruction more than AVX-512, which rounds to bfloat16.
  if (simd == Simd::kAvx512Bf16 && shape.table_dtype != DType::kBF16) simd = Simd::kAvx512;
  // A variant needs one vector or more in each half of a head: 16 columns with AVX-512, 8 with
  // AVX2.
  const int64_t half_dim = shape.head_dim / 2;
  if (simd >= Simd::kAvx512 && half_dim < 16) simd = Simd::kAvx2;
  if (simd == Simd::kAvx2 && half_dim < 8) simd = Simd::kBaseline;
  if (simd == Simd::kAvx512Bf16) return SelectAvx512Bf16(shape);
  if (simd == Simd::kAvx512) return SelectAvx512(shape);
  if (simd == Simd::kAvx2) return SelectAvx2(shape);
#endif
  return SelectBaseline(shape);
}

}  // namespace jax_kvcache::dequant_rope_quant_kvcache
