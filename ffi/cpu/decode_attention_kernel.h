// Owns the interface of the CPU kernel of decode_attention: pointers, a checked shape and the parts
// of a call, nothing of XLA.
#ifndef JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_H_
#define JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_H_

#include <cstdint>

#include "core/decode_attention.h"
#include "cpu/simd_level.h"

namespace jax_kvcache::decode_attention {

// The arrays of one checked call; shapes and dtypes as in core/decode_attention.h, absent ones
// null.
struct Buffers {
  const void* q = nullptr;             // [*g, B, S, Nq, D]
  const int8_t* k_cache = nullptr;     // [*g', NB, R, Nkv, D]
  const int8_t* v_cache = nullptr;     // [*g', NB, R, Nkv, D]
  const int32_t* table = nullptr;      // [*g, B, M]
  const int32_t* positions = nullptr;  // [*g, B, S]
  const float* scale_k = nullptr;      // [*g', Nkv, D]
  const float* scale_v = nullptr;      // [*g', Nkv, D]
  const float* offset_k = nullptr;     // [*g', Nkv, D]
  const float* offset_v = nullptr;     // [*g', Nkv, D]
  const float* sinks = nullptr;        // [*g', Nq]
  void* out = nullptr;                 // [*g, B, S, Nq, D]
  float* lse = nullptr;                // [*g, B, S, Nq]
};

Buffers ToBuffers(const Call& call, const Shape& shape);

// A part of a call: some queries of one sequence, over some of its rows, for some kv heads. The
// query heads of a kv head stay together, since they read the same codes.
struct Part {
  int64_t group = 0;                       // in [0, G)
  int64_t sequence = 0;                    // in [0, B)
  int64_t query_begin = 0, query_end = 0;  // of S
  int64_t head_begin = 0, head_end = 0;    // of Nkv
  int64_t row_begin = 0, row_end = 0;      // in the sequence's own numbering
  // The rows of a sequence may be cut into chunks. Each leaves partial results, and when all have
  // done so, they are merged.
  int64_t chunk = 0, chunks = 1;
  int64_t first_partial = 0;  // where the partial results of chunk 0 begin, in floats
  int64_t counter = 0;        // which of the plan's counters says how many chunks are left
};

// The number of query rows that share one kv head in a part.
inline int64_t PartQueries(const Shape& shape, const Part& part) {
  return (part.query_end - part.query_begin) * shape.queries_per_kv_head();
}

// The weighted sums of one query row, in floats: D, and room for whole vectors of every variant.
inline int64_t SumsSize(int64_t head_dim) { return (head_dim + 31) / 32 * 32; }

// A partial result of one query row: its sums, its greatest score, its sum of weights, and what its
// scores lack (see TileState).
inline int64_t PartialSize(int64_t head_dim) { return SumsSize(head_dim) + 3; }

// The partial results of one chunk: [Nkv, queries of the part, PartialSize], whichever heads the
// part has.
inline int64_t ChunkSize(const Shape& shape, const Part& part) {
  return shape.num_kv_heads * PartQueries(shape, part) * PartialSize(shape.head_dim);
}

// From this number of query rows per kv head on, a part's codes are converted to float32 once and
// kept in the cache for all of them. Below it they are converted on their way to the registers:
// faster up to 12, as fast at 16.
inline constexpr int64_t kManyQueries = 16;

// One instruction set's kernel. Each function runs on the calling thread; the parts of a call may
// run at the same time. Tables and positions may have any values: what does not exist is not read.
struct Kernel {
  // How many floats of scratch memory the other two functions need for this part.
  int64_t (*scratch_size)(const Shape& shape, const Part& part);
  // Writes the part's results, or its partial results if it has several chunks.
  void (*run_part)(const Shape& shape, const Buffers& buffers, const Part& part, float* scratch,
                   float* partials);
  // Joins the partial results of all chunks of the part's queries and heads; writes the results.
  void (*merge_chunks)(const Shape& shape, const Buffers& buffers, const Part& part, float* scratch,
                       const float* partials);
};

// The kernel for an instruction set that is supported here.
const Kernel& SelectKernel(Simd simd);

}  // namespace jax_kvcache::decode_attention

#endif  // JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_H_
