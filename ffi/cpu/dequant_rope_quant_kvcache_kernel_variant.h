// Owns the list of the kernel's variants: one entry point per instruction set, all of them compiled
// from dequant_rope_quant_kvcache_kernel_variant.cc.
#ifndef JAX_KVCACHE_FFI_CPU_DEQUANT_ROPE_QUANT_KVCACHE_KERNEL_VARIANT_H_
#define JAX_KVCACHE_FFI_CPU_DEQUANT_ROPE_QUANT_KVCACHE_KERNEL_VARIANT_H_

#include "cpu/dequant_rope_quant_kvcache_kernel.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {

Kernel SelectBaseline(const Shape& shape);
Kernel SelectAvx2(const Shape& shape);
Kernel SelectAvx512(const Shape& shape);
Kernel SelectAvx512Bf16(const Shape& shape);

}  // namespace jax_kvcache::dequant_rope_quant_kvcache

#endif  // JAX_KVCACHE_FFI_CPU_DEQUANT_ROPE_QUANT_KVCACHE_KERNEL_VARIANT_H_
