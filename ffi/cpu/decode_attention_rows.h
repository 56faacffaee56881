// Owns the walk over the rows of one sequence: which rows of the caches they are, a block at a time.
#ifndef JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_ROWS_H_
#define JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_ROWS_H_

#include <algorithm>
#include <cstdint>

#include "cpu/decode_attention_kernel.h"

namespace jax_kvcache::decode_attention {
namespace {

// So many rows go through the softmax at a time. One kv head's block of K and of V is then 8 KB each
// for D = 128, and the blocks of 8 heads, with those that are being fetched, fit a level-2 cache.
constexpr int64_t kBlockRows = 64;
// Loops over rows may run over the end of a block up to the next multiple of this.
constexpr int64_t kRowsTogether = 16;

// Rows that exist, in increasing order of their numbers.
struct RowBlock {
  int64_t count = 0;
  const int8_t* k[kBlockRows];  // [Nkv, D] each. Behind `count` the last row is repeated up to a
  const int8_t* v[kBlockRows];  // multiple of kRowsTogether.
  int64_t number[kBlockRows];   // in the sequence's own numbering
};

class RowWalk {
 public:
  RowWalk(const Shape& shape, const Buffers& b, const Part& part)
      : row_size_(shape.row_size()),
        block_rows_(shape.block_rows),
        blocks_(shape.blocks),
        table_(b.table +
               (part.group * shape.sequences + part.sequence) * shape.table_blocks),
        row_(part.row_begin),
        end_(part.row_end),
        column_(part.row_begin / shape.block_rows),
        in_block_(part.row_begin % shape.block_rows) {
    const int64_t cache_size = blocks_ * block_rows_ * row_size_;
    k_cache_ = b.k_cache + shape.ParameterBlock(kKCache, part.group) * cache_size;
    v_cache_ = b.v_cache + shape.ParameterBlock(kVCache, part.group) * cache_size;
  }

  // Fills the next block. It is empty if there are no more rows.
  void Next(RowBlock* block) {
    int64_t count = 0;
    while (row_ < end_ && count < kBlockRows) {
      int64_t run = std::min(block_rows_ - in_block_, end_ - row_);
      const int64_t cache_block = table_[column_];
      if (cache_block >= 0 && cache_block < blocks_) {
        run = std::min(run, kBlockRows - count);
        const int64_t first = (cache_block * block_rows_ + in_block_) * row_size_;
        for (int64_t i = 0; i < run; ++i) {
          block->k[count + i] = k_cache_ + first + i * row_size_;
          block->v[count + i] = v_cache_ + first + i * row_size_;
          block->number[count + i] = row_ + i;
        }
        count += run;
      }
      row_ += run;
      in_block_ += run;
      if (in_block_ == block_rows_) {
        in_block_ = 0;
        ++column_;
      }
    }
    block->count = count;
    for (int64_t i = count; i % kRowsTogether != 0; ++i) {
      block->k[i] = block->k[count - 1];
      block->v[i] = block->v[count - 1];
    }
  }

 private:
  const int64_t row_size_;
  const int64_t block_rows_;
  const int64_t blocks_;
  const int32_t* const table_;
  const int8_t* k_cache_;
  const int8_t* v_cache_;
  int64_t row_;
  const int64_t end_;
  int64_t column_;    // of the table
  int64_t in_block_;  // row of that column's block
};

}  // namespace
}  // namespace jax_kvcache::decode_attention

#endif  // JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_ROWS_H_
