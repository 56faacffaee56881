// Owns one instruction set's attention kernel: the walk of a part over its rows and kv heads.
// Compiled once per instruction set; JAX_KVCACHE_VARIANT names the entry point.
#include "cpu/decode_attention_variant.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/decode_attention_few.h"
#include "cpu/decode_attention_many.h"
#include "cpu/decode_attention_math.h"
#include "cpu/decode_attention_queries.h"
#include "cpu/decode_attention_rows.h"
#include "cpu/decode_attention_softmax.h"

namespace jax_kvcache::decode_attention {
namespace {

constexpr int kFewTileWidth = 4;

int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Sizes that follow from a part.
struct PartSizes {
  PartSizes(const Shape& shape, const Part& part)
      : queries(PartQueries(shape, part)),
        many(queries >= kManyQueries),
        tile_width(many ? kMaxTileWidth : kFewTileWidth),
        tiles((queries + tile_width - 1) / tile_width),
        head_dim(std::max<int64_t>(shape.head_dim, kLanes)),
        slots((head_dim + kLanes - 1) / kLanes),
        stride(AccumulatorSize(shape.head_dim)),
        heads(part.head_end - part.head_begin) {}

  // The width of tile t: the last one may be narrower.
  int64_t Width(int64_t t) const {
    const int64_t left = queries - t * tile_width;
    if (many) return left > kLanes ? 2 * kLanes : kLanes;
    return left > 2 ? 4 : left;
  }

  // Floats of scratch: per head, and for all of them together.
  int64_t PaddedQueries() const { return tiles * tile_width; }
  int64_t TileFloats() const {
    return static_cast<int64_t>(sizeof(TileState) / sizeof(float)) + kMaxTileWidth;
  }
  int64_t HeadFloats() const {
    return PaddedQueries() * stride * 2 + 2 * stride + tiles * RoundUp(TileFloats(), 16);
  }
  int64_t ScoreFloats() const { return kBlockRows * (many ? tile_width : PaddedQueries()); }
  int64_t ValueFloats() const { return many ? kBlockRows * stride * 2 : 0; }
  int64_t StagedFloats() const { return kBlockRows * kLanes * 2 / 4; }

  const int64_t queries;     // query rows per kv head
  const bool many;           // see kManyQueries
  const int64_t tile_width;  // of all tiles but the last
  const int64_t tiles;
  const int64_t head_dim;  // D, or kLanes where that is more: then codes are staged with zeros
  const int64_t slots;     // vectors of a head
  const int64_t stride;    // of accumulators
  const int64_t heads;
};

// What one kv head keeps while the blocks of rows go by.
struct Head {
  float* packed;        // queries: [tiles][slots, W, kLanes] or [tiles][D, W]
  float* accumulators;  // [padded queries, stride]
  float* centre_k;      // [slots, kLanes]
  float* centre_v;      // [slots, kLanes]
  float* tiles;         // [tiles]: a TileState and [kMaxTileWidth] constants
};

class PartRun {
 public:
  PartRun(const Shape& shape, const Buffers& b, const Part& part, float* scratch)
      : shape_(shape), b_(b), part_(part), sizes_(shape, part), scratch_(scratch) {
    heads_ = Take(sizes_.heads * sizes_.HeadFloats());
    scores_ = Take(sizes_.ScoreFloats());
    keys_ = Take(sizes_.ValueFloats());
    values_ = keys_ + sizes_.ValueFloats() / 2;
    staged_ = reinterpret_cast<int8_t*>(Take(sizes_.StagedFloats()));
    row_ = Take(2 * sizes_.stride);
    const int64_t queries = part.query_end - part.query_begin;
    first_ = reinterpret_cast<int32_t*>(Take(2 * queries));
    end_ = first_ + queries;
  }

  static int64_t ScratchSize(const Shape& shape, const Part& part) {
    const PartSizes sizes(shape, part);
    const auto whole = [](int64_t n) { return RoundUp(n, 16); };
    return whole(sizes.heads * sizes.HeadFloats()) + whole(sizes.ScoreFloats()) +
           whole(sizes.ValueFloats()) + whole(sizes.StagedFloats()) + whole(2 * sizes.stride) +
           whole(2 * (part.query_end - part.query_begin));
  }

  void Run(float* partials) {
    for (int64_t h = 0; h < sizes_.heads; ++h) Prepare(h);
    FindLimits();
    RowWalk walk(shape_, b_, part_);
    RowBlock blocks[2];
    int now = 0;
    walk.Next(&blocks[now]);
    while (blocks[now].count > 0) {
      walk.Next(&blocks[1 - now]);
      Block(blocks[now], blocks[1 - now]);
      now = 1 - now;
    }
    for (int64_t h = 0; h < sizes_.heads; ++h) Finish(h, partials);
  }

 private:
  float* Take(int64_t floats) {
    float* const taken = scratch_;
    scratch_ += RoundUp(floats, 16);
    return taken;
  }

  Head At(int64_t h) const {
    Head head;
    head.packed = heads_ + h * sizes_.HeadFloats();
    head.accumulators = head.packed + sizes_.PaddedQueries() * sizes_.stride;
    head.centre_k = head.accumulators + sizes_.PaddedQueries() * sizes_.stride;
    head.centre_v = head.centre_k + sizes_.stride;
    head.tiles = head.centre_v + sizes_.stride;
    return head;
  }
  TileState* State(const Head& head, int64_t tile) const {
    return reinterpret_cast<TileState*>(head.tiles + tile * RoundUp(sizes_.TileFloats(), 16));
  }
  float* Constants(const Head& head, int64_t tile) const {
    return reinterpret_cast<float*>(State(head, tile) + 1);
  }

  Channels ChannelsOf(int64_t h) const {
    const int64_t first =
        shape_.head_dim < kLanes ? 0 : (part_.head_begin + h) * shape_.head_dim;
    return {first, sizes_.head_dim, sizes_.slots};
  }

  // Puts the queries in the order of the products and clears the sums.
  void Prepare(int64_t h) {
    const Head head = At(h);
    const int64_t d = shape_.head_dim;
    std::memset(head.packed, 0, static_cast<size_t>(sizes_.HeadFloats()) * sizeof(float));
    const HeadParameters parameters(shape_, b_, part_.group, part_.head_begin + h);
    PackCentre(parameters.offset_k, head.centre_k);
    PackCentre(parameters.offset_v, head.centre_v);
    for (int64_t t = 0; t < sizes_.tiles; ++t) {
      std::fill_n(State(head, t)->peak, kMaxTileWidth, -kInfinity);
    }
    const int64_t group = shape_.queries_per_kv_head();
    const float unit = shape_.scale * ScoreUnit(shape_);
    for (int64_t i = 0; i < sizes_.queries; ++i) {
      const int64_t query = Query(i / group);
      const int64_t q_head = (part_.head_begin + h) * group + i % group;
      std::memset(row_, 0, static_cast<size_t>(sizes_.stride) * sizeof(float));
      Read(b_.q, shape_.q_dtype, (query * shape_.num_q_heads + q_head) * d, d, row_);
      double constant = 0;
      for (int64_t c = 0; c < d; ++c) {
        const float value = row_[c] * (parameters.scale_k[c] * unit);
        row_[c] = value + (value - value);  // an infinity becomes NaN, as its scores are
      }
      if (parameters.offset_k != nullptr && UsesConstants()) {
        for (int64_t c = 0; c < d; ++c) {
          const Floats<1> offset = Load<1>(parameters.offset_k + c);
          constant += double{row_[c]} * double{(Centre<1>(offset) - offset)[0]};
        }
      }
      const int64_t t = i / sizes_.tile_width;
      const int64_t width = sizes_.Width(t);
      PackQuery(head.packed + t * sizes_.tile_width * sizes_.stride, width,
                i % sizes_.tile_width);
      float* const constants = Constants(head, t);
      for (int64_t lane = i % sizes_.tile_width; lane < kMaxTileWidth; lane += width) {
        constants[lane] = static_cast<float>(constant);
      }
    }
  }

  bool UsesConstants() const {
    return shape_.soft_cap != 0.0f || shape_.has_sinks || shape_.return_lse;
  }

  void PackCentre(const float* offset, float* centre) const {
    if (offset == nullptr) return;
    const Channels channels = {0, sizes_.head_dim, sizes_.slots};
    for (int64_t i = 0; i < sizes_.slots * kLanes; ++i) {
      const int64_t channel = channels.At(i / kLanes) + i % kLanes;
      if (channel < shape_.head_dim) {
        centre[i] = Centre<1>(Load<1>(offset + channel))[0];
      }
    }
  }

  // Query row `query` of a tile, from row_.
  void PackQuery(float* packed, int64_t width, int64_t query) const {
    if (sizes_.many) {
      for (int64_t c = 0; c < sizes_.head_dim; ++c) packed[c * width + query] = row_[c];
      return;
    }
    const Channels channels = {0, sizes_.head_dim, sizes_.slots};
    for (int64_t slot = 0; slot < sizes_.slots; ++slot) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t channel = channels.At(slot) + lane;
        packed[(slot * width + query) * kLanes + lane] =
            channel < slot * kLanes ? 0.0f : row_[channel];
      }
    }
  }

  // Number `s` of the part's queries, in [0, G * B * S).
  int64_t Query(int64_t s) const {
    return (part_.group * shape_.sequences + part_.sequence) * shape_.queries +
           part_.query_begin + s;
  }
  int64_t LastRow(int64_t s) const { return b_.positions[Query(s)]; }
  int64_t FirstRow(int64_t s) const {
    return shape_.window == 0 ? 0 : LastRow(s) - shape_.window + 1;
  }

  // Between these rows every query sees every row.
  void FindLimits() {
    all_first_ = 0;
    all_last_ = INT64_MAX;
    for (int64_t s = 0; s < part_.query_end - part_.query_begin; ++s) {
      all_first_ = std::max(all_first_, FirstRow(s));
      all_last_ = std::min(all_last_, LastRow(s));
    }
  }

  // One block of rows, all heads. Asks for the rows of the next one meanwhile.
  void Block(const RowBlock& block, const RowBlock& next) {
    const int64_t rows = RoundUp(block.count, kRowsTogether);
    const bool all_seen =
        block.number[0] >= all_first_ && block.number[block.count - 1] <= all_last_;
    if (!all_seen) {
      const int64_t* const numbers = block.number;
      for (int64_t s = 0; s < part_.query_end - part_.query_begin; ++s) {
        first_[s] = static_cast<int32_t>(
            std::lower_bound(numbers, numbers + block.count, FirstRow(s)) - numbers);
        end_[s] = static_cast<int32_t>(
            std::upper_bound(numbers, numbers + block.count, LastRow(s)) - numbers);
      }
    }
    for (int64_t h = 0; h < sizes_.heads; ++h) {
      // While head h works, it asks for its share of the next block in the order of memory.
      const int8_t* ahead_k[kBlockRows];
      const int8_t* ahead_v[kBlockRows];
      const bool fetch = next.count > 0;
      for (int64_t i = 0; i < rows && fetch; ++i) {
        const int64_t piece = std::min(h * rows + i, next.count * sizes_.heads - 1);
        const int64_t column =
            (part_.head_begin + piece % sizes_.heads) * shape_.head_dim;
        ahead_k[i] = next.k[piece / sizes_.heads] + column;
        ahead_v[i] = next.v[piece / sizes_.heads] + column;
      }
      const int8_t* const* k = block.k;
      const int8_t* const* v = block.v;
      const int8_t* staged_k[kBlockRows];
      const int8_t* staged_v[kBlockRows];
      if (shape_.head_dim < kLanes) {
        const int64_t column = (part_.head_begin + h) * shape_.head_dim;
        Stage(k, rows, column, staged_, staged_k);
        Stage(v, rows, column, staged_ + kBlockRows * kLanes, staged_v);
        k = staged_k;
        v = staged_v;
      }
      const Work work = {h, block.count, rows, all_seen, k, v, fetch ? ahead_k : nullptr,
                         fetch ? ahead_v : nullptr};
      if (shape_.has_offset) {
        sizes_.many ? Many<true>(work) : Few<true>(work);
      } else {
        sizes_.many ? Many<false>(work) : Few<false>(work);
      }
    }
  }

  // A head that is shorter than a vector: its codes and zeros.
  void Stage(const int8_t* const* from, int64_t rows, int64_t column, int8_t* to,
             const int8_t** staged) const {
    std::memset(to, 0, static_cast<size_t>(rows * kLanes));
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(to + r * kLanes, from[r] + column, static_cast<size_t>(shape_.head_dim));
      staged[r] = to + r * kLanes;
    }
  }

  // One head's part of a block.
  struct Work {
    int64_t head;
    int64_t count;  // rows
    int64_t rows;   // the same, rounded up to kRowsTogether
    bool all_seen;
    const int8_t* const* k;
    const int8_t* const* v;
    const int8_t* const* ahead_k;
    const int8_t* const* ahead_v;
  };

  // scores [rows, W] of a tile to weights; false if no query of the tile sees a row of the block.
  bool Weigh(const Work& work, const Head& head, int64_t tile, float* scores, float* factors) {
    const int64_t width = sizes_.Width(tile);
    ScoreRule rule;
    int32_t first[kMaxTileWidth];
    int32_t end[kMaxTileWidth];
    if (!work.all_seen) {
      const int64_t group = shape_.queries_per_kv_head();
      bool any = false;
      for (int64_t lane = 0; lane < kMaxTileWidth; ++lane) {
        const int64_t i = std::min(tile * sizes_.tile_width + lane % width, sizes_.queries - 1);
        first[lane] = first_[i / group];
        end[lane] = end_[i / group];
        any = any || first[lane] < end[lane];
      }
      if (!any) return false;
      rule.first = first;
      rule.end = end;
    }
    if (shape_.soft_cap != 0.0f) {
      rule.cap = shape_.soft_cap * kLog2E;
      rule.constants = Constants(head, tile);
    }
    std::fill(scores + work.count * width, scores + work.rows * width, -kInfinity);
    if (width > kLanes) {
      Softmax<2>(scores, work.rows, width, rule, State(head, tile), factors);
    } else {
      Softmax<1>(scores, work.rows, width, rule, State(head, tile), factors);
    }
    return true;
  }

  template <bool kCentred>
  void Few(const Work& work) {
    constexpr int64_t kMaxTiles = kManyQueries / kFewTileWidth;
    const Head head = At(work.head);
    const Channels channels = ChannelsOf(work.head);
    float factors[kMaxTiles][kMaxTileWidth];
    bool used[kMaxTiles];
    for (int64_t r = 0; r < work.rows; r += kRowsTogether) {
      for (int64_t t = 0; t < sizes_.tiles; ++t) {
        const int64_t width = sizes_.Width(t);
        const auto score = width == 4   ? ScoreRows<4, kCentred>
                           : width == 2 ? ScoreRows<2, kCentred>
                                        : ScoreRows<1, kCentred>;
        score(work.k + r, kRowsTogether, channels, Packed(head, t), head.centre_k,
              t == 0 && work.ahead_k != nullptr ? work.ahead_k + r : nullptr,
              Scores(t) + r * width);
      }
    }
    for (int64_t t = 0; t < sizes_.tiles; ++t) {
      used[t] = Weigh(work, head, t, Scores(t), factors[t]);
    }
    for (int64_t r = 0; r < work.count; r += kRowsTogether) {
      if (work.ahead_v != nullptr) {
        for (int64_t i = r; i < r + kRowsTogether; ++i) {
          Prefetch(work.ahead_v[i], shape_.head_dim);
        }
      }
      const int64_t count = std::min(kRowsTogether, work.count - r);
      for (int64_t t = 0; t < sizes_.tiles; ++t) {
        if (!used[t]) continue;
        const int64_t width = sizes_.Width(t);
        const auto add = width == 4   ? AddRows<4, kCentred>
                         : width == 2 ? AddRows<2, kCentred>
                                      : AddRows<1, kCentred>;
        add(work.v + r, count, channels, Scores(t) + r * width, head.centre_v, factors[t],
            head.accumulators + t * sizes_.tile_width * sizes_.stride, sizes_.stride);
        std::fill_n(factors[t], width, 1.0f);
      }
    }
  }

  template <bool kCentred>
  void Many(const Work& work) {
    const Head head = At(work.head);
    const Channels channels = ChannelsOf(work.head);
    ConvertKeys<kCentred>(work.k, work.rows, channels, head.centre_k, work.ahead_k, keys_);
    ConvertValues<kCentred>(work.v, work.count, channels, head.centre_v, work.ahead_v, values_);
    for (int64_t t = 0; t < sizes_.tiles; ++t) {
      const int64_t width = sizes_.Width(t);
      const auto score = width > kLanes ? ScoreTile<2> : ScoreTile<1>;
      score(keys_, work.rows, sizes_.head_dim, Packed(head, t), scores_);
      float factors[kMaxTileWidth];
      if (!Weigh(work, head, t, scores_, factors)) continue;
      AddTile(values_, work.count, (sizes_.slots + 1) / 2, scores_, width,
              std::min(width, sizes_.queries - t * sizes_.tile_width), factors,
              head.accumulators + t * sizes_.tile_width * sizes_.stride, sizes_.stride);
    }
  }

  const float* Packed(const Head& head, int64_t tile) const {
    return head.packed + tile * sizes_.tile_width * sizes_.stride;
  }
  float* Scores(int64_t tile) const { return scores_ + tile * kBlockRows * sizes_.tile_width; }

  // Writes the head's results, or its partial results if there are other chunks.
  void Finish(int64_t h, float* partials) {
    const Head head = At(h);
    const HeadParameters parameters(shape_, b_, part_.group, part_.head_begin + h);
    ResultWriter writer(shape_, b_, parameters, row_);
    const int64_t group = shape_.queries_per_kv_head();
    for (int64_t i = 0; i < sizes_.queries; ++i) {
      const int64_t t = i / sizes_.tile_width;
      const int64_t lane = i % sizes_.tile_width;
      const TileState& state = *State(head, t);
      float total = 0;
      for (int64_t l = lane; l < std::max<int64_t>(kLanes, lane + 1); l += sizes_.Width(t)) {
        total += state.total[l];
      }
      const float* const sums = head.accumulators + i * sizes_.stride;
      const float constant = shape_.soft_cap == 0.0f ? Constants(head, t)[lane] : 0.0f;
      if (part_.chunks == 1) {
        writer.Put(Query(i / group), (part_.head_begin + h) * group + i % group, sums,
                   state.peak[lane], total, constant);
        continue;
      }
      float* const partial = partials + part_.first_partial +
                             part_.chunk * PartialsSize(shape_, part_) +
                             (h * sizes_.queries + i) * PartialSize(shape_.head_dim);
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
  float* scratch_;
  float* heads_;    // [heads, HeadFloats]
  float* scores_;   // [tiles or 1][kBlockRows, W]
  float* keys_;     // [kBlockRows, D]
  float* values_;   // [slots / 2, kBlockRows, 2 * kLanes]
  int8_t* staged_;  // [2, kBlockRows, kLanes]
  float* row_;      // [2 * stride]
  int32_t* first_;  // [queries]: the first row of the block that a query sees
  int32_t* end_;    // [queries]: the row behind the last
  int64_t all_first_ = 0;
  int64_t all_last_ = 0;
};

int64_t ScratchSize(const Shape& shape, const Part& part) {
  return PartRun::ScratchSize(shape, part);
}

void RunPart(const Shape& shape, const Buffers& b, const Part& part, float* scratch,
             float* partials) {
  PartRun(shape, b, part, scratch).Run(partials);
}

void MergeChunks(const Shape& shape, const Buffers& b, const Part& part, float* scratch,
                 const float* partials) {
  const int64_t size = PartialSize(shape.head_dim);
  const int64_t stride = AccumulatorSize(shape.head_dim);
  const int64_t chunk_size = PartialsSize(shape, part);
  const int64_t queries = PartQueries(shape, part);
  const int64_t group = shape.queries_per_kv_head();
  float* const sums = scratch;
  for (int64_t head = part.head_begin; head < part.head_end; ++head) {
    const HeadParameters parameters(shape, b, part.group, head);
    ResultWriter writer(shape, b, parameters, scratch + stride);
    for (int64_t i = 0; i < queries; ++i) {
      const float* const first =
          partials + part.first_partial + ((head - part.head_begin) * queries + i) * size;
      float peak = -kInfinity;
      for (int64_t chunk = 0; chunk < part.chunks; ++chunk) {
        peak = std::max(peak, first[chunk * chunk_size + stride]);
      }
      std::memset(sums, 0, static_cast<size_t>(stride) * sizeof(float));
      float total = 0;
      for (int64_t chunk = 0; chunk < part.chunks; ++chunk) {
        const float* const partial = first + chunk * chunk_size;
        if (partial[stride] == -kInfinity) continue;  // this chunk saw no row
        const Vector factor = Exp2(Vector{} + (partial[stride] - peak));
        total += partial[stride + 1] * factor[0];
        for (int64_t k = 0; k < stride; k += kLanes) {
          StoreVector(LoadVector(sums + k) + LoadVector(partial + k) * factor, sums + k);
        }
      }
      const int64_t query = (part.group * shape.sequences + part.sequence) * shape.queries +
                            part.query_begin + i / group;
      writer.Put(query, head * group + i % group, sums, peak, total, first[stride + 2]);
    }
  }
}

}  // namespace

const Kernel& JAX_KVCACHE_VARIANT() {
  static constexpr Kernel kKernel = {ScratchSize, RunPart, MergeChunks};
  return kKernel;
}

}  // namespace jax_kvcache::decode_attention
