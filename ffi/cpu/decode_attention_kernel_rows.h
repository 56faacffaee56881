// Owns the walk over the rows of one sequence: which rows of the caches they are, a block at a
// time.
#ifndef JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_ROWS_H_
#define JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_ROWS_H_

#include <algorithm>
#include <cstdint>

#include "cpu/decode_attention_kernel.h"

namespace jax_kvcache::decode_attention {
namespace {

// Loops over the rows of a block may run over its end, up to the next multiple of this.
constexpr int64_t kRowsTogether = 16;
constexpr int64_t kMaxBlockRows = 64;

// Rows that exist, in increasing order of their numbers.
struct RowBlock {
  int64_t count = 0;
  const int8_t* k[kMaxBlockRows];  // [Nkv, D] each. Behind `count` the last row is repeated up to a
  const int8_t* v[kMaxBlockRows];  // multiple of kRowsTogether.
  int64_t number[kMaxBlockRows];   // in the sequence's own numbering
};

// Reads the table and finds the rows of a part. Rows in blocks that do not exist are left out.
class RowWalk {
 public:
  RowWalk(const Shape& shape, const Buffers& b, const Part& part, int64_t rows_per_block)
      : rows_per_block_(rows_per_block),
        row_size_(shape.row_size()),
        block_rows_(shape.block_rows),
        blocks_(shape.blocks),
        table_(b.table + (part.group * shape.sequences + part.sequence) * shape.table_blocks),
        end_(part.row_end),
        row_(part.row_begin),
        column_(part.row_begin / shape.block_rows),
        in_block_(part.row_begin % shape.block_rows) {
    const int64_t cache_size = blocks_ * block_rows_ * row_size_;
    k_cache_ = b.k_cache + shape.ParameterBlock(kKCache, part.group) * cache_size;
    v_cache_ = b.v_cache + shape.ParameterBlock(kVCache, part.group) * cache_size;
  }

  // Fills the next block with up to `rows_per_block` rows, with none after the last.
  void Next(RowBlock* block) {
    int64_t count = 0;
    while (row_ < end_ && count < rows_per_block_) {
      int64_t run = std::min(block_rows_ - in_block_, end_ - row_);
      const int64_t cache_block = table_[column_];
      if (cache_block >= 0 && cache_block < blocks_) {
        run = std::min(run, rows_per_block_ - count);
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
  const int64_t rows_per_block_;
  const int64_t row_size_;
  const int64_t block_rows_;
  const int64_t blocks_;
  const int32_t* const table_;  // [M] of the sequence
  const int8_t* k_cache_;       // of the group
  const int8_t* v_cache_;
  const int64_t end_;
  int64_t row_;
  int64_t column_;    // of the table
  int64_t in_block_;  // row of that column's block
};

// Walks over the codes of the next block in the order of memory: row after row, and within a row
// head after head of the part. Each step gives the D codes of K and of V of one head in one row,
// which the processor is then asked to fetch. While a head of the current block is computed, it
// takes as many steps as it has rows, so that all heads together have walked over the next block.
class PieceWalk {
 public:
  PieceWalk(const RowBlock& block, int64_t first_head, int64_t heads, int64_t head_dim)
      : block_(block), first_(first_head * head_dim), heads_(heads), head_dim_(head_dim) {}

  void Next(const int8_t** k, const int8_t** v) {
    *k = block_.k[row_] + first_ + head_ * head_dim_;
    *v = block_.v[row_] + first_ + head_ * head_dim_;
    if (++head_ < heads_) return;
    head_ = 0;
    row_ = std::min(row_ + 1, block_.count - 1);
  }

 private:
  const RowBlock& block_;  // not empty
  const int64_t first_;
  const int64_t heads_;
  const int64_t head_dim_;
  int64_t row_ = 0;
  int64_t head_ = 0;
};

}  // namespace
}  // namespace jax_kvcache::decode_attention

#endif  // JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_ROWS_H_
