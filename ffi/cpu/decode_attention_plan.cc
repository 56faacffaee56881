// Owns the sizes of the parts of a call of decode_attention.
#include "cpu/decode_attention_plan.h"

#include <algorithm>
#include <limits>

#include "cpu/threads.h"

namespace jax_kvcache::decode_attention {
namespace {

// Query rows per kv head in one part, if there are so many: the codes are converted once for all of
// them, and their sums still fit a level-2 cache.
constexpr int64_t kQueriesPerPart = 128;

// Several heads of a part read neighbouring channels of a row: up to this many bytes in a piece.
constexpr int64_t kBytesPerPiece = 4096;

// A call that is large enough has about so many chunks and heads that can be told apart, which
// keeps dozens of cores busy.
constexpr int64_t kEnoughParts = 64;

// The rows of a chunk: below the least, writing and joining partial results costs more than a few
// percent of reading the rows; above the most, rounding errors of the sums would grow.
constexpr int64_t kLeastRows = 256;
constexpr int64_t kMostRows = 4096;

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

}  // namespace

Plan MakePlan(const Shape& shape, const int32_t* positions, int64_t max_threads) {
  const int64_t per_head = shape.queries_per_kv_head();
  const bool many = shape.queries * per_head >= kManyQueries;
  const int64_t queries_per_span =
      many ? std::clamp<int64_t>(kQueriesPerPart / per_head, 1, shape.queries) : shape.queries;
  const std::vector<Span> spans = FindSpans(shape, positions, queries_per_span);

  int64_t rows = 0;
  for (const Span& span : spans) rows += span.rows();
  // Converted codes are kept for one head at a time, so there is nothing to gain from more.
  int64_t heads =
      many ? 1 : std::clamp<int64_t>(kBytesPerPiece / shape.head_dim, 1, shape.num_kv_heads);
  const int64_t rows_per_chunk =
      std::clamp(CeilDivide(rows * CeilDivide(shape.num_kv_heads, heads), kEnoughParts),
                 kLeastRows, kMostRows);
  int64_t chunks = 0;
  for (const Span& span : spans) {
    chunks += std::max<int64_t>(1, CeilDivide(span.rows(), rows_per_chunk));
  }

  Plan plan;
  // A code costs as much as reading it up to about 4 queries, and as much as 4 from there on.
  const int64_t queries = std::min(shape.queries, queries_per_span) * per_head;
  plan.threads = WorthThreads(
      rows * shape.row_size() * 2 * std::max<int64_t>(1, CeilDivide(queries, 4)) * 2, max_threads);
  // Heads are independent, so their number may follow the threads.
  while (heads > 1 && chunks * CeilDivide(shape.num_kv_heads, heads) < 4 * plan.threads) {
    heads = CeilDivide(heads, 2);
  }

  for (const Span& span : spans) {
    const int64_t span_chunks = std::max<int64_t>(1, CeilDivide(span.rows(), rows_per_chunk));
    const int64_t span_rows = CeilDivide(CeilDivide(span.rows(), span_chunks), 16) * 16;
    for (int64_t head = 0; head < shape.num_kv_heads; head += heads) {
      Part part;
      part.group = span.group;
      part.sequence = span.sequence;
      part.query_begin = span.query_begin;
      part.query_end = span.query_end;
      part.head_begin = head;
      part.head_end = std::min(head + heads, shape.num_kv_heads);
      part.chunks = span_chunks;
      part.first_partial = plan.partials_size;
      part.counter = static_cast<int64_t>(plan.chunks.size());
      if (span_chunks > 1) {
        plan.chunks.push_back(span_chunks);
        plan.partials_size += span_chunks * PartialsSize(shape, part);
      }
      for (int64_t chunk = 0; chunk < span_chunks; ++chunk) {
        part.chunk = chunk;
        part.row_begin = std::min(span.row_begin + chunk * span_rows, span.row_end);
        part.row_end = std::min(part.row_begin + span_rows, span.row_end);
        plan.parts.push_back(part);
      }
    }
  }
  return plan;
}

}  // namespace jax_kvcache::decode_attention
