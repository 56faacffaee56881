// Owns how a call of decode_attention is cut into parts that may run at the same time.
#ifndef JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_PLAN_H_
#define JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_PLAN_H_

#include <cstdint>
#include <vector>

#include "cpu/decode_attention_kernel.h"

namespace jax_kvcache::decode_attention {

// Which rows are added to which follows from the shape and the positions alone, so that the results
// have the same bits on any number of threads.
struct Plan {
  std::vector<Part> parts;      // neighbours read neighbouring rows
  std::vector<int64_t> chunks;  // for each counter, how many chunks it counts
  int64_t partials_size = 0;    // floats of partial results
  int64_t threads = 1;          // how many threads are worth having
};

// `positions`: [*g, B, S]. `max_threads`: what the pool has.
Plan MakePlan(const Shape& shape, const int32_t* positions, int64_t max_threads);

}  // namespace jax_kvcache::decode_attention

#endif  // JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_PLAN_H_
