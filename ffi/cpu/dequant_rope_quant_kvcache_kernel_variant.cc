// Owns the kernel's instantiations for one instruction set. This file is compiled once per
// instruction set, and JAX_KVCACHE_VARIANT is the name of that variant's entry point.
#include "cpu/dequant_rope_quant_kvcache_kernel_variant.h"

#include <cstdint>

#include "cpu/dequant_rope_quant_kvcache_kernel_walk.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {
namespace {

template <typename X, typename Table, typename Bias>
void Run(const Shape& shape, const Buffers& buffers, const Part& part) {
  PartWalk<X, Table, Bias>(shape, buffers, part).Run();
}

// The kernel for one element type of the tables, for each of x and the bias.
template <typename Table>
Kernel Select(const Shape& shape) {
  if (!shape.x_is_accumulator()) return Run<Table, Table, NoBias>;
  if (!shape.has_bias) return Run<int32_t, Table, NoBias>;
  switch (shape.bias_dtype) {
    case DType::kS32:
      return Run<int32_t, Table, int32_t>;
    case DType::kF16:
      return Run<int32_t, Table, Half>;
    case DType::kBF16:
      return Run<int32_t, Table, BFloat>;
    default:
      return Run<int32_t, Table, float>;
  }
}

}  // namespace

Kernel JAX_KVCACHE_VARIANT(const Shape& shape) {
  switch (shape.table_dtype) {
    case DType::kBF16:
      return Select<BFloat>(shape);
#if !defined(__AVX512BF16__)  // SelectKernel uses this variant for bfloat16 tables only.
    case DType::kF16:
      return Select<Half>(shape);
    case DType::kF32:
      return Select<float>(shape);
#endif
    default:
      return nullptr;  // no other type passes Validate
  }
}

}  // namespace jax_kvcache::dequant_rope_quant_kvcache
