// Owns the sizes of the parts of a call of decode_attention.
#include "cpu/decode_attention_plan.h"

#include <algorithm>
#include <limits>

#include "cpu/threads.h"

namespace jax_kvcache::decode_attention {
namespace {

// Query rows per kv head in one part, if there are as many: the codes are converted once for all of
// them, which then costs a tenth of the products, and their sums fit a level-2 cache.
constexpr int64_t kQueriesPerPart = 128;

// The heads of a part read neighbouring channels, so many bytes of each row: a page of memory,
// beyond which nothing is gained.
constexpr int64_t kBytesPerPiece = 4096;

// Rows are cut into chunks only as far as there would be fewer parts than this, or half of it if
// the parts can be split by heads as well. It keeps dozens of cores busy, and bounds the memory for
// partial results: to those of about this number of parts.
constexpr int64_t kEnoughParts = 64;

// A chunk has at least so many rows: with fewer, writing and merging partial results would cost
// more than a few percent of reading the rows.
constexpr int64_t kLeastRows = 256;

// The rows of a chunk, but for the last one, are whole blocks of the kernel.
constexpr int64_t kRowsMultiple = 64;

int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Queries of one sequence and the rows that they see.
struct Span {
  int64_t group, sequence, query_begin, query_end, row_begin, row_end;
  int64_t rows() const { return row_end - row_begin; }
};

std::vector<Span> FindSpans(const Shape& shape, const int32_t* positions,
                            int64_t queries_per_span) {
  // The rows of a sequence, M * R, as far as positions can name them.
  constexpr int64_t kNamed = int64_t{std::numeric_limits<int32_t>::max()} + 1;
  const int64_t capacity = shape.table_blocks > kNamed / shape.block_rows
                               ? kNamed
                               : shape.table_blocks * shape.block_rows;
  std::vector<Span> spans;
  for (int64_t n = 0; n < shape.groups.count * shape.sequences; ++n) {
    for (int64_t begin = 0; begin < shape.queries; begin += queries_per_span) {
      const int64_t end = std::min(begin + queries_per_span, shape.queries);
      int64_t first = kNamed;
      int64_t last = -1;
      for (int64_t s = begin; s < end; ++s) {
        const int64_t position = positions[n * shape.queries + s];
        if (position < 0) continue;
        first = std::min(first, position);
        last = std::max(last, position);
      }
      const int64_t row_end = std::min(last + 1, capacity);
      int64_t row_begin = shape.window == 0 ? 0 : std::max<int64_t>(0, first - shape.window + 1);
      row_begin = std::min(row_begin, row_end);
      spans.push_back({n / shape.sequences, n % shape.sequences, begin, end, row_begin, row_end});
    }
  }
  return spans;
}

int64_t ChunksOf(const Span& span, int64_t rows_per_chunk) {
  return std::max<int64_t>(1, CeilDivide(span.rows(), rows_per_chunk));
}

}  // namespace

Plan MakePlan(const Shape& shape, const int32_t* positions, int64_t max_threads) {
  const int64_t per_head = shape.queries_per_kv_head();
  const bool many = shape.queries * per_head >= kManyQueries;
  const int64_t queries_per_span =
      many ? std::clamp<int64_t>(kQueriesPerPart / per_head, 1, shape.queries) : shape.queries;
  const std::vector<Span> spans = FindSpans(shape, positions, queries_per_span);

  int64_t rows = 0;
  for (const Span& span : spans) rows += span.rows();
  // Many queries keep converted codes, of one head at a time.
  int64_t heads =
      many ? 1 : std::clamp<int64_t>(kBytesPerPiece / shape.head_dim, 1, shape.num_kv_heads);
  const int64_t enough = heads > 1 ? kEnoughParts / 2 : kEnoughParts;
  const int64_t rows_per_chunk =
      std::max(kLeastRows, CeilDivide(rows * CeilDivide(shape.num_kv_heads, heads), enough));
  int64_t chunks = 0;
  for (const Span& span : spans) chunks += ChunksOf(span, rows_per_chunk);

  Plan plan;
  // WorthThreads asks for the bytes of a copy that takes as long. Computing with one code takes
  // about as long as copying two bytes, for up to four query rows together; eight query rows take
  // twice that, and so on.
  const int64_t quads = CeilDivide(std::min(shape.queries, queries_per_span) * per_head, 4);
  const double bytes = 4.0 * static_cast<double>(rows) * static_cast<double>(shape.row_size()) *
                       static_cast<double>(quads);
  plan.threads = WorthThreads(static_cast<int64_t>(std::min(bytes, 1e15)), max_threads);
  // The split over heads changes no result, so it may follow the threads: two parts for each.
  // (Parts with one head of 128 channels are 15 % slower than those with eight.)
  while (heads > 1 && plan.threads > 1 &&
         chunks * CeilDivide(shape.num_kv_heads, heads) < 2 * plan.threads) {
    heads = CeilDivide(heads, 2);
  }
  const int64_t parts_of_heads = CeilDivide(shape.num_kv_heads, heads);

  for (const Span& span : spans) {
    Part part;
    part.group = span.group;
    part.sequence = span.sequence;
    part.query_begin = span.query_begin;
    part.query_end = span.query_end;
    part.chunks = ChunksOf(span, rows_per_chunk);
    part.first_partial = plan.partials_size;
    const int64_t rows_of_each =
        CeilDivide(CeilDivide(span.rows(), part.chunks), kRowsMultiple) * kRowsMultiple;
    const int64_t first_counter = static_cast<int64_t>(plan.chunks.size());
    if (part.chunks > 1) {
      plan.chunks.resize(plan.chunks.size() + static_cast<size_t>(parts_of_heads), part.chunks);
      plan.partials_size += part.chunks * ChunkSize(shape, part);
    }
    for (part.chunk = 0; part.chunk < part.chunks; ++part.chunk) {
      part.row_begin = std::min(span.row_begin + part.chunk * rows_of_each, span.row_end);
      part.row_end = std::min(part.row_begin + rows_of_each, span.row_end);
      for (int64_t i = 0; i < parts_of_heads; ++i) {
        part.head_begin = i * heads;
        part.head_end = std::min(part.head_begin + heads, shape.num_kv_heads);
        part.counter = first_counter + i;
        plan.parts.push_back(part);
      }
    }
  }
  return plan;
}

}  // namespace jax_kvcache::decode_attention
