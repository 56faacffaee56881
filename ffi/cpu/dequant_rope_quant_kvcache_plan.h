// Owns how a call of dequant_rope_quant_kvcache is divided into parts that may run at the same
// time.
#ifndef JAX_KVCACHE_FFI_CPU_DEQUANT_ROPE_QUANT_KVCACHE_PLAN_H_
#define JAX_KVCACHE_FFI_CPU_DEQUANT_ROPE_QUANT_KVCACHE_PLAN_H_

#include <cstdint>

#include "cpu/dequant_rope_quant_kvcache_kernel.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {

// A call as `count` parts, divided by tokens or by heads. No two parts write the same byte. So if
// several tokens name the same row, the row holds all of the last of them, never a mixture.
struct Plan {
  int64_t count = 1;
  int64_t threads = 1;   // how many threads the call is worth
  int64_t per_part = 0;  // tokens, or heads
  bool by_heads = false;

  Part At(const Shape& shape, int64_t index) const;
};

// `slots`: [*g, T]. `max_threads`: how many threads there are.
Plan MakePlan(const Shape& shape, const int32_t* slots, int64_t max_threads);

// Whether no two of `count` slots are the same row in [0, rows). The answer may be false although
// it is so, never true although it is not.
bool HasDistinctRows(const int32_t* slots, int64_t count, int64_t rows);

}  // namespace jax_kvcache::dequant_rope_quant_kvcache

#endif  // JAX_KVCACHE_FFI_CPU_DEQUANT_ROPE_QUANT_KVCACHE_PLAN_H_
