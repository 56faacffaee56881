// Owns the list of the attention kernel's variants: one entry point per instruction set, all of
// them compiled from decode_attention_kernel_variant.cc.
#ifndef JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_VARIANT_H_
#define JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_VARIANT_H_

#include "cpu/decode_attention_kernel.h"

namespace jax_kvcache::decode_attention {

const Kernel& SelectBaseline();
const Kernel& SelectAvx2();
const Kernel& SelectAvx512();

}  // namespace jax_kvcache::decode_attention

#endif  // JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_VARIANT_H_
