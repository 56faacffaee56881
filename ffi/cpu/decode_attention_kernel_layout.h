// Owns where a part keeps what in its scratch memory.
#ifndef JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_LAYOUT_H_
#define JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_LAYOUT_H_

#include <algorithm>
#include <cstdint>

#include "cpu/decode_attention_kernel.h"
#include "cpu/decode_attention_kernel_few.h"
#include "cpu/decode_attention_kernel_rows.h"
#include "cpu/decode_attention_kernel_softmax.h"

namespace jax_kvcache::decode_attention {
namespace {

constexpr int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The query rows of a kv head are cut into tiles of this width. With 32 registers a tile of few
// queries may be wider, and codes are converted for twice as many at once.
constexpr int64_t kFewTileWidth = kLanes == 16 ? 8 : 4;

// Rows in a block. Few queries: a short block is read twice, by the two products of all heads,
// while it is in the level-2 cache together with the next one (16 is 5 to 15 % faster than 64).
// Many: each block costs a pass over the sums, which weighs more.
constexpr int64_t kFewBlockRows = kRowsTogether;
constexpr int64_t kManyBlockRows = kMaxBlockRows;

// Sizes that follow from a part.
struct PartSizes {
  PartSizes(const Shape& shape, const Part& part)
      : heads(part.head_end - part.head_begin),
        positions(part.query_end - part.query_begin),
        queries(PartQueries(shape, part)),
        many(queries >= kManyQueries),
        block_rows(many ? kManyBlockRows : kFewBlockRows),
        tile_width(many ? kMaxTileWidth : kFewTileWidth),
        tiles((queries + tile_width - 1) / tile_width),
        head_dim(std::max<int64_t>(shape.head_dim, kLanes)),
        slots((head_dim + kLanes - 1) / kLanes),
        stride(SumsSize(shape.head_dim)) {}

  // The width W of tile t: the last one may be narrower.
  int64_t Width(int64_t t) const {
    const int64_t left = queries - t * tile_width;
    if (many) return left > kLanes ? 2 * kLanes : kLanes;
    if (left > 4) return kFewTileWidth;
    return left > 2 ? 4 : left;
  }

  Channels ChannelsFrom(int64_t first) const { return {first, head_dim, slots}; }

  const int64_t heads;
  const int64_t positions;   // of S
  const int64_t queries;     // query rows per kv head
  const bool many;           // see kManyQueries
  const int64_t block_rows;  // rows that go through the softmax at a time
  const int64_t tile_width;  // of all tiles but the last
  const int64_t tiles;
  const int64_t head_dim;  // D, or kLanes if that is more: shorter heads are copied and get zeros
  const int64_t slots;     // vectors of a head
  const int64_t stride;    // floats of one query's sums
};

// What one kv head of a part keeps while the blocks of rows go by.
struct HeadMemory {
  float* packed;     // [tiles, tile_width * stride]: tile t is [slots, W, kLanes] or [D, W]
  float* sums;       // [tiles * tile_width, stride], of which [slots, kLanes] are used
  float* centre_k;   // [slots, kLanes]
  float* centre_v;   // [slots, kLanes]
  TileState* tiles;  // [tiles]
};

class PartMemory {
 public:
  PartMemory(const PartSizes& sizes, float* memory) : sizes_(sizes) {
    heads_ = memory;
    scores = heads_ + sizes.heads * HeadFloats(sizes);
    keys = scores + ScoreFloats(sizes);
    values = keys + ValueFloats(sizes);
    staged_k = reinterpret_cast<int8_t*>(values + ValueFloats(sizes));
    staged_v = staged_k + kStagedBytes;
    row = reinterpret_cast<float*>(staged_v + kStagedBytes);
    seen_begin = reinterpret_cast<int32_t*>(row + RowFloats(sizes));
    seen_end = seen_begin + RoundUp(sizes.positions, 16);
  }

  // Floats, a multiple of 16 as all that it consists of.
  static int64_t Size(const PartSizes& sizes) {
    return sizes.heads * HeadFloats(sizes) + ScoreFloats(sizes) + 2 * ValueFloats(sizes) +
           2 * kStagedBytes / 4 + RowFloats(sizes) + 2 * RoundUp(sizes.positions, 16);
  }

  HeadMemory Head(int64_t h) const {
    const int64_t queries_size = sizes_.tiles * sizes_.tile_width * sizes_.stride;
    HeadMemory head;
    head.packed = heads_ + h * HeadFloats(sizes_);
    head.sums = head.packed + queries_size;
    head.centre_k = head.sums + queries_size;
    head.centre_v = head.centre_k + sizes_.stride;
    head.tiles = reinterpret_cast<TileState*>(head.centre_v + sizes_.stride);
    return head;
  }
  static int64_t HeadFloats(const PartSizes& sizes) {
    return sizes.tiles * sizes.tile_width * sizes.stride * 2 + sizes.stride * 2 +
           sizes.tiles * static_cast<int64_t>(sizeof(TileState) / sizeof(float));
  }

  float* Scores(int64_t tile) const {
    return scores + (sizes_.many ? 0 : tile * sizes_.block_rows * sizes_.tile_width);
  }

  float* scores;        // many: [block rows, W] of one tile; few: the same for each tile
  float* keys;          // many: [block rows, D]
  float* values;        // many: [slots / 2, block rows, 2, kLanes]
  int8_t* staged_k;     // [kMaxBlockRows, kLanes]: the codes of heads shorter than a vector
  int8_t* staged_v;     // the same of V
  float* row;           // [2 * stride]: one query at a time
  int32_t* seen_begin;  // [positions]: the first row of the block that a query sees
  int32_t* seen_end;    // [positions]: the row behind the last

 private:
  static constexpr int64_t kStagedBytes = kMaxBlockRows * kLanes;

  static int64_t ScoreFloats(const PartSizes& sizes) {
    return sizes.block_rows * sizes.tile_width * (sizes.many ? 1 : sizes.tiles);
  }
  static int64_t ValueFloats(const PartSizes& sizes) {
    return sizes.many ? sizes.block_rows * sizes.stride : 0;
  }
  static int64_t RowFloats(const PartSizes& sizes) { return 2 * sizes.stride; }

  const PartSizes& sizes_;
  float* heads_;
};

}  // namespace
}  // namespace jax_kvcache::decode_attention

#endif  // JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_KERNEL_LAYOUT_H_
