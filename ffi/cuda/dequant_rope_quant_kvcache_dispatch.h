// Owns the choice of the template arguments of a thread of dequant_rope_quant_kvcache.
#ifndef JAX_KVCACHE_FFI_CUDA_DEQUANT_ROPE_QUANT_KVCACHE_DISPATCH_H_
#define JAX_KVCACHE_FFI_CUDA_DEQUANT_ROPE_QUANT_KVCACHE_DISPATCH_H_

#include <cstdint>
#include <type_traits>

#include "cuda/dequant_rope_quant_kvcache_thread.h"

namespace jax_kvcache::dequant_rope_quant_kvcache::cuda {

template <typename T>
struct TypeOf {
  using type = T;
};

// Calls visit(TypeOf<X>, TypeOf<Table>, columns), where `columns` is an integral_constant, and
// returns what it returns.
template <typename Visit>
auto Dispatch(const Shape& shape, const Plan& plan, const Visit& visit) {
  const auto with_columns = [&](auto x, auto table) {
    if (plan.columns == kWideColumns) {
      return visit(x, table, std::integral_constant<int, kWideColumns>());
    }
    return visit(x, table, std::integral_constant<int, 1>());
  };
  const auto with_table = [&](auto table) {
    if (shape.x_is_accumulator()) return with_columns(TypeOf<int32_t>(), table);
    return with_columns(table, table);  // any other x has the tables' type
  };
  switch (shape.table_dtype) {
    case DType::kF16:
      return with_table(TypeOf<Half>());
    case DType::kBF16:
      return with_table(TypeOf<BFloat>());
    default:
      return with_table(TypeOf<float>());
  }
}

}  // namespace jax_kvcache::dequant_rope_quant_kvcache::cuda

#endif  // JAX_KVCACHE_FFI_CUDA_DEQUANT_ROPE_QUANT_KVCACHE_DISPATCH_H_
