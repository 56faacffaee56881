// Owns where a block of threads of decode_attention works: which sequence, kv head, query rows and
// split.
#ifndef JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_PLACE_H_
#define JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_PLACE_H_

#include <cstdint>

#include "cuda/decode_attention_call.h"
#include "cuda/device.h"

namespace jax_kvcache::decode_attention::cuda {

struct Place {
  uint32_t sequence;  // in [0, G * B)
  uint32_t group;     // in [0, G)
  uint32_t kv_head;
  uint32_t split;
  uint32_t first_query_row;  // of the kv head

  JAX_KVCACHE_DEVICE Place(const Arguments& a, uint32_t block) {
    first_query_row = block % a.tiles * kTileRows;
    block /= a.tiles;
    split = block % a.splits;
    block /= a.splits;
    kv_head = block % a.kv_heads;
    sequence = block / a.kv_heads;
    group = sequence / a.sequences;
  }

  // Query row `i` of the block, which exists, as (query, query head).
  struct Query {
    int64_t query;    // in [0, G * B * S)
    uint32_t q_head;  // in [0, Nq)
  };
  JAX_KVCACHE_DEVICE Query At(const Arguments& a, int i) const {
    const uint32_t row = first_query_row + static_cast<uint32_t>(i);
    const uint32_t query = row / a.queries_per_head;
    return {sequence * a.shape.queries + query,
            kv_head * a.queries_per_head + (row - query * a.queries_per_head)};
  }

  // The query rows of the block that exist, at most kTileRows.
  JAX_KVCACHE_DEVICE int NumQueryRows(const Arguments& a) const {
    const uint32_t rest = a.query_rows - first_query_row;
    return rest < kTileRows ? static_cast<int>(rest) : kTileRows;
  }
};

// Where the parameters [Nkv, D] or [Nq] of a group begin.
JAX_KVCACHE_DEVICE const float* OfGroup(const Arguments& a, const float* parameter, Arg arg,
                                        int64_t group, int64_t size) {
  if (parameter == nullptr) return nullptr;
  return parameter + a.shape.groups.ParameterBlock(a.shape.group_mask[arg], group) * size;
}

// Where the codes of a kv head begin in a group's cache.
JAX_KVCACHE_DEVICE const int8_t* CodesOf(const Arguments& a, const int8_t* cache, Arg arg,
                                         const Place& place) {
  const int64_t rows = a.shape.blocks * a.shape.block_rows;
  const int64_t row_size = a.shape.num_kv_heads * a.shape.head_dim;
  const int64_t block = a.shape.groups.ParameterBlock(a.shape.group_mask[arg], place.group);
  return cache + block * rows * row_size + place.kv_head * a.shape.head_dim;
}

}  // namespace jax_kvcache::decode_attention::cuda

#endif  // JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_PLACE_H_
