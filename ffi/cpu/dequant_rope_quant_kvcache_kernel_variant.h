// Owns the list of entry points that kernel_variant.cc is compiled into.
#ifndef JAX_KVCACHE_FFI_KERNEL_VARIANT_H_
#define JAX_KVCACHE_FFI_KERNEL_VARIANT_H_

#include "kernel.h"

namespace jax_kvcache {

Kernel SelectBaseline(const Shape& shape);
Kernel SelectAvx2(const Shape& shape);
Kernel SelectAvx512(const Shape& shape);
Kernel SelectAvx512Bf16(const Shape& shape);

}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_KERNEL_VARIANT_H_
