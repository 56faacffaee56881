// Owns one instruction set's attention kernel: a part's walk over blocks of rows and kv heads, and
// the merge of its chunks. Compiled once per instruction set; JAX_KVCACHE_VARIANT names the entry
// point.
#include "cpu/decode_attention_kernel_variant.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/decode_attention_kernel_few.h"
#include "cpu/decode_attention_kernel_layout.h"
#include "cpu/decode_attention_kernel_many.h"
#include "cpu/decode_attention_kernel_math.h"
#include "cpu/decode_attention_kernel_queries.h"
#include "cpu/decode_attention_kernel_rows.h"
#include "cpu/decode_attention_kernel_softmax.h"

namespace jax_kvcache::decode_attention {
namespace {

// Number `s` of the part's positions, in [0, G * B * S).
int64_t QueryNumber(const Shape& shape, const Part& part, int64_t s) {
  return (part.group * shape.sequences + part.sequence) * shape.queries + part.query_begin + s;
}

class PartRun {
 public:
  PartRun(const Shape& shape, const Buffers& b, const Part& part, float* scratch)
      : shape_(shape), b_(b), part_(part), sizes_(shape, part), memory_(sizes_, scratch) {}

  void Run(float* partials) {
    for (int64_t h = 0; h < sizes_.heads; ++h) Prepare(h);
    FindLimits();
    RowWalk walk(shape_, b_, part_, sizes_.block_rows);
    RowBlock blocks[2];
    int now = 0;
    walk.Next(&blocks[now]);
    while (blocks[now].count > 0) {
      walk.Next(&blocks[1 - now]);
      ReadBlock(blocks[now], blocks[1 - now]);
      now = 1 - now;
    }
    for (int64_t h = 0; h < sizes_.heads; ++h) Finish(h, partials);
  }

 private:
  // One head's share of a block.
  struct Work {
    HeadMemory head;
    Channels channels;
    int64_t count;  // rows
    int64_t rows;   // the same, rounded up to kRowsTogether
    bool all_seen;  // by all queries
    const int8_t* const* k;
    const int8_t* const* v;
    Ahead ahead;
  };

  void Prepare(int64_t h) {
    const HeadMemory head = memory_.Head(h);
    const HeadParameters parameters(shape_, b_, part_.group, part_.head_begin + h);
    std::memset(head.packed, 0,
                static_cast<size_t>(PartMemory::HeadFloats(sizes_)) * sizeof(float));
    if (shape_.has_offset) {
      PackCentre(sizes_, parameters.offset_k, shape_.head_dim, head.centre_k);
      PackCentre(sizes_, parameters.offset_v, shape_.head_dim, head.centre_v);
    }
    for (int64_t t = 0; t < sizes_.tiles; ++t) {
      std::fill_n(head.tiles[t].peak, kMaxTileWidth, -kInfinity);
    }
    std::fill_n(memory_.row, sizes_.stride, 0.0f);
    const int64_t d = shape_.head_dim;
    const int64_t group = shape_.queries_per_kv_head();
    for (int64_t i = 0; i < sizes_.queries; ++i) {
      const int64_t result = QueryNumber(shape_, part_, i / group) * shape_.num_q_heads +
                             (part_.head_begin + h) * group + i % group;
      Read(b_.q, shape_.q_dtype, result * d, d, memory_.row);
      const float constant = ScaleQuery(shape_, parameters, memory_.row);
      const int64_t t = i / sizes_.tile_width;
      const int64_t width = sizes_.Width(t);
      PackQuery(sizes_, memory_.row, width, i % sizes_.tile_width,
                head.packed + t * sizes_.tile_width * sizes_.stride);
      for (int64_t lane = i % sizes_.tile_width; lane < kMaxTileWidth; lane += width) {
        head.tiles[t].constant[lane] = constant;
      }
    }
  }

  int64_t LastRow(int64_t s) const { return b_.positions[QueryNumber(shape_, part_, s)]; }
  int64_t FirstRow(int64_t s) const {
    return shape_.window == 0 ? 0 : LastRow(s) - shape_.window + 1;
  }

  // Finds the rows that all queries see.
  void FindLimits() {
    for (int64_t s = 0; s < sizes_.positions; ++s) {
      first_seen_by_all_ = std::max(first_seen_by_all_, FirstRow(s));
      last_seen_by_all_ = std::min(last_seen_by_all_, LastRow(s));
    }
  }

  // Finds the rows of a block that each query sees. Returns whether all see all.
  bool FindSeen(const RowBlock& block) {
    const int64_t* const begin = block.number;
    const int64_t* const end = block.number + block.count;
    if (begin[0] >= first_seen_by_all_ && end[-1] <= last_seen_by_all_) return true;
    for (int64_t s = 0; s < sizes_.positions; ++s) {
      memory_.seen_begin[s] =
          static_cast<int32_t>(std::lower_bound(begin, end, FirstRow(s)) - begin);
      memory_.seen_end[s] = static_cast<int32_t>(std::upper_bound(begin, end, LastRow(s)) - begin);
    }
    return false;
  }

  void ReadBlock(const RowBlock& block, const RowBlock& next) {
    const int64_t rows = RoundUp(block.count, kRowsTogether);
    const bool all_seen = FindSeen(block);
    PieceWalk pieces(next, part_.head_begin, sizes_.heads, shape_.head_dim);
    for (int64_t h = 0; h < sizes_.heads; ++h) {
      const int64_t first = (part_.head_begin + h) * shape_.head_dim;
      Work work = {memory_.Head(h), sizes_.ChannelsFrom(first),
                   block.count,     rows,
                   all_seen,        block.k,
                   block.v,         {}};
      const int8_t* ahead_k[kMaxBlockRows];
      const int8_t* ahead_v[kMaxBlockRows];
      if (next.count > 0) {
        for (int64_t r = 0; r < rows; ++r) pieces.Next(&ahead_k[r], &ahead_v[r]);
        work.ahead = {ahead_k, ahead_v};
      }
      const int8_t* staged_k[kMaxBlockRows];
      const int8_t* staged_v[kMaxBlockRows];
      if (shape_.head_dim < kLanes) {
        work.channels = sizes_.ChannelsFrom(0);
        work.k = Stage(block.k, rows, first, memory_.staged_k, staged_k);
        work.v = Stage(block.v, rows, first, memory_.staged_v, staged_v);
      }
      if (shape_.has_offset) {
        sizes_.many ? ManyQueries<true>(work) : FewQueries<true>(work);
      } else {
        sizes_.many ? ManyQueries<false>(work) : FewQueries<false>(work);
      }
    }
  }

  // Copies the codes of a head that is shorter than a vector, with zeros behind them.
  const int8_t* const* Stage(const int8_t* const* from, int64_t rows, int64_t first, int8_t* to,
                             const int8_t** staged) const {
    std::memset(to, 0, static_cast<size_t>(rows * kLanes));
    for (int64_t r = 0; r < rows; ++r) {
      staged[r] = to + r * kLanes;
      std::memcpy(to + r * kLanes, from[r] + first, static_cast<size_t>(shape_.head_dim));
    }
    return staged;
  }

  template <bool kCentred>
  void FewQueries(const Work& work) {
    constexpr int64_t kMaxTiles = kManyQueries / kFewTileWidth;
    static_assert(kMaxTiles * kFewTileWidth == kManyQueries);
    for (int64_t t = 0; t < sizes_.tiles; ++t) {
      const int64_t width = sizes_.Width(t);
      const auto score = width == 8   ? ScoreRows<8, kCentred>
                         : width == 4 ? ScoreRows<4, kCentred>
                         : width == 2 ? ScoreRows<2, kCentred>
                                      : ScoreRows<1, kCentred>;
      score(work.k, work.rows, work.channels, Packed(work.head, t), work.head.centre_k,
            t == 0 ? work.ahead : Ahead(), memory_.Scores(t));
    }
    for (int64_t t = 0; t < sizes_.tiles; ++t) {
      float factors[kMaxTileWidth];
      if (!Weigh(work, t, factors)) continue;
      const int64_t width = sizes_.Width(t);
      const auto add = width == 8   ? AddRows<8, kCentred>
                       : width == 4 ? AddRows<4, kCentred>
                       : width == 2 ? AddRows<2, kCentred>
                                    : AddRows<1, kCentred>;
      add(work.v, work.count, work.channels, memory_.Scores(t), work.head.centre_v, factors,
          Sums(work.head, t), sizes_.stride);
    }
  }

  template <bool kCentred>
  void ManyQueries(const Work& work) {
    ConvertKeys<kCentred>(work.k, work.rows, work.channels, work.head.centre_k, work.ahead,
                          memory_.keys);
    ConvertValues<kCentred>(work.v, work.count, work.channels, work.head.centre_v, memory_.values);
    for (int64_t t = 0; t < sizes_.tiles; ++t) {
      const int64_t width = sizes_.Width(t);
      const auto score = width > kLanes ? ScoreTile<2> : ScoreTile<1>;
      score(memory_.keys, work.rows, sizes_.head_dim, Packed(work.head, t), memory_.Scores(t));
      float factors[kMaxTileWidth];
      if (!Weigh(work, t, factors)) continue;
      const int64_t queries = std::min(width, sizes_.queries - t * sizes_.tile_width);
      AddTile(memory_.values, work.count, (sizes_.slots + 1) / 2, memory_.Scores(t), width, queries,
              factors, Sums(work.head, t), sizes_.stride);
    }
  }

  const float* Packed(const HeadMemory& head, int64_t tile) const {
    return head.packed + tile * sizes_.tile_width * sizes_.stride;
  }
  float* Sums(const HeadMemory& head, int64_t tile) const {
    return head.sums + tile * sizes_.tile_width * sizes_.stride;
  }

  // Turns the scores of a tile into weights. Returns whether any of its queries sees a row.
  bool Weigh(const Work& work, int64_t tile, float* factors) {
    const int64_t width = sizes_.Width(tile);
    float* const scores = memory_.Scores(tile);
    ScoreRule rule;
    int32_t seen_begin[kMaxTileWidth];
    int32_t seen_end[kMaxTileWidth];
    if (!work.all_seen) {
      const int64_t group = shape_.queries_per_kv_head();
      bool any = false;
      for (int64_t lane = 0; lane < kMaxTileWidth; ++lane) {
        const int64_t i = tile * sizes_.tile_width + lane % width;
        const int64_t s = std::min(i, sizes_.queries - 1) / group;
        seen_begin[lane] = memory_.seen_begin[s];
        seen_end[lane] = memory_.seen_end[s];
        any = any || seen_begin[lane] < seen_end[lane];
      }
      if (!any) return false;
      rule.seen_begin = seen_begin;
      rule.seen_end = seen_end;
    }
    rule.cap = shape_.soft_cap * kLog2E;
    std::fill(scores + work.count * width, scores + work.rows * width, -kInfinity);
    const auto softmax = width > kLanes ? Softmax<2> : Softmax<1>;
    softmax(scores, work.rows, width, rule, &work.head.tiles[tile], factors);
    return true;
  }

  // Writes the head's results, or its partial results if there are other chunks.
  void Finish(int64_t h, float* partials) {
    const HeadMemory head = memory_.Head(h);
    const HeadParameters parameters(shape_, b_, part_.group, part_.head_begin + h);
    const ResultWriter writer(shape_, b_, parameters, memory_.row);
    const int64_t group = shape_.queries_per_kv_head();
    for (int64_t i = 0; i < sizes_.queries; ++i) {
      const int64_t width = sizes_.Width(i / sizes_.tile_width);
      const int64_t lane = i % sizes_.tile_width;
      const TileState& state = head.tiles[i / sizes_.tile_width];
      float total = state.total[lane];
      for (int64_t l = lane + width; l < kLanes; l += width) total += state.total[l];
      const float* const sums = head.sums + i * sizes_.stride;
      // With a soft cap it is in the scores already.
      const float constant = shape_.soft_cap == 0.0f ? state.constant[lane] : 0.0f;
      if (part_.chunks == 1) {
        writer.Put(QueryNumber(shape_, part_, i / group),
                   (part_.head_begin + h) * group + i % group, sums, state.peak[lane], total,
                   constant);
        continue;
      }
      float* const partial =
          partials + part_.first_partial + part_.chunk * ChunkSize(shape_, part_) +
          ((part_.head_begin + h) * sizes_.queries + i) * PartialSize(shape_.head_dim);
      std::memcpy(partial, sums, static_cast<size_t>(sizes_.stride) * sizeof(float));
      partial[sizes_.stride] = state.peak[lane];
      partial[sizes_.stride + 1] = total;
      partial[sizes_.stride + 2] = constant;
    }
  }

  const Shape& shape_;
  const Buffers& b_;
  const Part& part_;
  const PartSizes sizes_;
  const PartMemory memory_;
  int64_t first_seen_by_all_ = 0;
  int64_t last_seen_by_all_ = INT64_MAX;
};

int64_t ScratchSize(const Shape& shape, const Part& part) {
  return PartMemory::Size(PartSizes(shape, part));
}

void RunPart(const Shape& shape, const Buffers& b, const Part& part, float* scratch,
             float* partials) {
  PartRun(shape, b, part, scratch).Run(partials);
}

void MergeChunks(const Shape& shape, const Buffers& b, const Part& part, float* scratch,
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

const Kernel& JAX_KVCACHE_VARIANT() {
  static constexpr Kernel kKernel = {ScratchSize, RunPart, MergeChunks};
  return kKernel;
}

}  // namespace jax_kvcache::decode_attention
