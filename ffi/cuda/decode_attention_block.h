// Owns what one block of threads of decode_attention does: 16 query rows of one kv head over one
// split of the cache rows, by four warps.
#ifndef JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_BLOCK_H_
#define JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_BLOCK_H_

#include <cstdint>

#include "cuda/decode_attention_finish.h"

namespace jax_kvcache::decode_attention::cuda {

template <int D>
class Block {
 public:
  using G = Geometry<D>;

  JAX_KVCACHE_DEVICE Block(const Arguments& a, uint32_t index, Shared<D>* shared)
      : a_(a), place_(a, index), shared_(*shared) {}

  JAX_KVCACHE_DEVICE void Run() {
    Queries<D> queries(a_, place_, &shared_);
    queries.Begin();
    jax_kvcache::cuda::SyncBlock();
    jax_kvcache::cuda::PerWarp<Walk<D>, kWarps> walks;
    EachWarp<kWarps>([&](int warp) {
      walks[warp].Begin(a_, place_, shared_, warp);
      queries.Prepare(warp);
    });
    jax_kvcache::cuda::SyncBlock();
    EachWarp<kWarps>([&](int warp) {
      walks[warp].Run(a_, place_, shared_);
      EachLane([&](int lane) {
        if (lane % 4 != 0) return;
        JAX_KVCACHE_UNROLL
        for (int h = 0; h < 2; ++h) {
          shared_.peak[warp][lane / 4 + 8 * h] = walks[warp].peak[lane].at[h];
          shared_.total[warp][lane / 4 + 8 * h] = walks[warp].total[lane].at[2 * h];
        }
      });
    });
    const int num_rows = place_.NumQueryRows(a_);
    JAX_KVCACHE_UNROLL
    for (int h = 0; h < 2; ++h) {
      if (num_rows <= 8 * h) break;
      jax_kvcache::cuda::SyncBlock();  // nobody reads q, or the sums of the rows before, any more
      EachWarp<kWarps>([&](int warp) { ShareSums(walks[warp], h, warp); });
      jax_kvcache::cuda::SyncBlock();
      EachWarp<kWarps>([&](int warp) {
        EachLane([&](int lane) { WriteRows(h, num_rows, warp * kWarpLanes + lane); });
      });
    }
  }

 private:
  // Puts a warp's sums for query rows 8h to 8h + 7 where all warps find them.
  JAX_KVCACHE_DEVICE void ShareSums(Walk<D>& walk, int h, int warp) {
    EachLane([&](int lane) {
      JAX_KVCACHE_UNROLL
      for (int j = 0; j < G::kColumnTiles; ++j) {
        JAX_KVCACHE_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int column = G::ValueColumn(lane % 4 * 2 + i, j);
          if (G::kColumnTiles * 8 == D || column < D) {
            shared_.sums[warp][lane / 4][column] = walk.sums[j][lane].at[2 * h + i];
          }
        }
      }
    });
  }

  // Adds up the warps' results for query rows 8h to 8h + 7 and writes them; `thread` of the block
  // does its share of the columns.
  JAX_KVCACHE_DEVICE void WriteRows(int h, int num_rows, int thread) {
    constexpr int kPacks = D / kMergedColumns;
    const int rows = num_rows - 8 * h < 8 ? num_rows - 8 * h : 8;
    for (int i = thread; i < rows * kPacks; i += kWarps * kWarpLanes) {
      WriteColumns(8 * h + i / kPacks, i % kPacks * kMergedColumns);
    }
  }

  JAX_KVCACHE_DEVICE void WriteColumns(int row, int column) {
    Merged<kMergedColumns> merged;
    JAX_KVCACHE_UNROLL
    for (int w = 0; w < kWarps; ++w) merged.See(shared_.peak[w][row], shared_.total[w][row]);
    JAX_KVCACHE_UNROLL
    for (int w = 0; w < kWarps; ++w) {
      merged.Add(shared_.peak[w][row], shared_.total[w][row],
                 LoadPack<kMergedColumns>(&shared_.sums[w][row % 8][column]));
    }
    const float bias = a_.shape.soft_cap != 0.0f ? 0.0f : shared_.bias[row];  // is in the scores
    const Place::Query query = place_.At(a_, row);
    if (a_.splits == 1) {
      Output<kMergedColumns>(a_, place_.group, query.query, query.q_head,
                             static_cast<uint32_t>(column))
          .Write(merged, bias);
      return;
    }
    const int64_t of_q = query.query * a_.shape.num_q_heads + query.q_head;
    float* const part = a_.partials + (of_q * a_.splits + place_.split) * (D + kExtras);
    jax_kvcache::cuda::StorePack<kMergedColumns>(merged.sums, part + column);
    if (column == 0) {
      const Pack<float, kExtras> extras = {{merged.peak, merged.total, bias, 0.0f}};
      jax_kvcache::cuda::StorePack<kExtras>(extras, part + D);
    }
  }

  const Arguments& a_;
  const Place place_;
  Shared<D>& shared_;
};

}  // namespace jax_kvcache::decode_attention::cuda

#endif  // JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_BLOCK_H_
