// Owns how a call is cut into parts that may run at the same time.
#ifndef JAX_KVCACHE_FFI_PLAN_H_
#define JAX_KVCACHE_FFI_PLAN_H_

#include <cstdint>

#include "kernel.h"

namespace jax_kvcache {

// A call as `count` parts, by tokens or by heads. No two parts write the same byte, so a duplicate
// row is never torn: of the tokens that name a row, the last one wins.
struct Plan {
  int64_t count = 1;
  int64_t threads = 1;   // how many threads are worth having
  int64_t per_part = 0;  // tokens, or heads
  bool by_heads = false;

  Part At(const Shape& shape, int64_t index) const;
};

// `slots`: [*g, T]. `max_threads`: what the pool has.
Plan MakePlan(const Shape& shape, const int32_t* slots, int64_t max_threads);

// How many threads that many bytes of traffic are worth, at most `max_threads`.
int64_t WorthThreads(int64_t bytes, int64_t max_threads);

// Whether no two of `count` slots are the same row in [0, rows). May say no when the answer is yes.
bool HasDistinctRows(const int32_t* slots, int64_t count, int64_t rows);

}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_PLAN_H_
