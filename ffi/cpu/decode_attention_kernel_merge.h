// Owns the merge of the partial results that the chunks of a sequence leave.
#ifndef JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_MERGE_H_
#define JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_MERGE_H_

#include <algorithm>
#include <cstdint>

#include "cpu/decode_attention_kernel.h"
#include "cpu/decode_attention_kernel_math.h"
#include "cpu/decode_attention_kernel_queries.h"

namespace jax_kvcache::decode_attention {
namespace {

// See Kernel. The chunks are added in their order, whichever ended first.
inline void MergeChunks(const Shape& shape, const Buffers& b, const Part& part, float* scratch,
                        const float* partials) {
  const int64_t stride = SumsSize(shape.head_dim);
  const int64_t chunk_size = ChunkSize(shape, part);
  const int64_t queries = PartQueries(shape, part);
  const int64_t group = shape.queries_per_kv_head();
  float* const sums = scratch;
  for (int64_t head = part.head_begin; head < part.head_end; ++head) {
    const HeadParameters parameters(shape, b, part.group, head);
    const ResultWriter writer(shape, b, parameters, scratch + stride);
    for (int64_t i = 0; i < queries; ++i) {
      const float* const first =
          partials + part.first_partial + (head * queries + i) * PartialSize(shape.head_dim);
      float peak = -kInfinity;
      for (int64_t chunk = 0; chunk < part.chunks; ++chunk) {
        peak = std::max(peak, first[chunk * chunk_size + stride]);
      }
      std::fill_n(sums, stride, 0.0f);
      float total = 0;
      for (int64_t chunk = 0; chunk < part.chunks; ++chunk) {
        const float* const partial = first + chunk * chunk_size;
        if (partial[stride] == -kInfinity) continue;  // no row was seen
        const Vector factor = Exp2(Vector{} + (partial[stride] - peak));
        total += partial[stride + 1] * factor[0];
        for (int64_t c = 0; c < stride; c += kLanes) {
          StoreVector(LoadVector(sums + c) + LoadVector(partial + c) * factor, sums + c);
        }
      }
      writer.Put(QueryNumber(shape, part, i / group), head * group + i % group, sums, peak, total,
                 first[stride + 2]);
    }
  }
}

}  // namespace
}  // namespace jax_kvcache::decode_attention

#endif  // JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_MERGE_H_
