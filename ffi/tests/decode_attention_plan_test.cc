// Owns the test that the parts of a call cover each query, head and row once, that rows are cut the
// same way for any number of threads, and that partial results have a place of their own.
#include "cpu/decode_attention_plan.h"

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "tests/check.h"
#include "tests/owned_tensor.h"

namespace jax_kvcache::decode_attention {
namespace {

Shape MakeShape(int64_t sequences, int64_t queries, int64_t num_q, int64_t num_kv, int64_t head_dim,
                int64_t rows) {
  Shape shape;
  shape.groups.count = 1;
  shape.sequences = sequences;
  shape.queries = queries;
  shape.num_q_heads = num_q;
  shape.num_kv_heads = num_kv;
  shape.head_dim = head_dim;
  shape.blocks = sequences;
  shape.block_rows = rows;
  shape.table_blocks = 1;
  return shape;
}

// How often each (query, head, row) is in a part.
std::vector<int> Cover(const Shape& shape, const Plan& plan) {
  std::vector<int> times(
      static_cast<size_t>(shape.sequences * shape.queries * shape.num_kv_heads * shape.block_rows));
  for (const Part& part : plan.parts) {
    for (int64_t s = part.query_begin; s < part.query_end; ++s) {
      for (int64_t h = part.head_begin; h < part.head_end; ++h) {
        const int64_t query = part.sequence * shape.queries + s;
        for (int64_t row = part.row_begin; row < part.row_end; ++row) {
          ++times[static_cast<size_t>((query * shape.num_kv_heads + h) * shape.block_rows + row)];
        }
      }
    }
  }
  return times;
}

// The rows at which sequences are cut.
std::vector<int64_t> Cuts(const Plan& plan) {
  std::vector<int64_t> cuts;
  for (const Part& part : plan.parts) {
    if (part.head_begin == 0) cuts.push_back(part.row_begin);
  }
  return cuts;
}

void CheckPlan(const Shape& shape, const std::vector<int32_t>& positions,
               const std::string& where) {
  const std::vector<int64_t> cuts = Cuts(MakePlan(shape, positions.data(), 1));
  for (const int64_t threads : {1, 2, 7, 64}) {
    const Plan plan = MakePlan(shape, positions.data(), threads);
    Check(plan.threads >= 1 && plan.threads <= threads, where + ": threads");
    Check(Cuts(plan) == cuts, where + ": the cuts follow the threads");
    const std::vector<int> times = Cover(shape, plan);
    for (int64_t query = 0; query < shape.sequences * shape.queries; ++query) {
      const int64_t position = positions[static_cast<size_t>(query)];
      for (int64_t h = 0; h < shape.num_kv_heads; ++h) {
        for (int64_t row = 0; row < shape.block_rows; ++row) {
          const bool seen = row <= position && (shape.window == 0 || row > position - shape.window);
          const int n =
              times[static_cast<size_t>((query * shape.num_kv_heads + h) * shape.block_rows + row)];
          Check(n == 1 || (n == 0 && !seen),
                where + ": row " + std::to_string(row) + " is in " + std::to_string(n) + " parts");
        }
      }
    }
    // Each chunk's partial results are in the memory for them, and nobody else's.
    std::vector<int> used(static_cast<size_t>(plan.partials_size));
    std::vector<int64_t> chunks(plan.chunks.size());
    for (const Part& part : plan.parts) {
      if (part.chunks == 1) continue;
      ++chunks[static_cast<size_t>(part.counter)];
      const int64_t size = PartQueries(shape, part) * PartialSize(shape.head_dim);
      const int64_t first = part.first_partial + part.chunk * ChunkSize(shape, part);
      for (int64_t i = first + part.head_begin * size; i < first + part.head_end * size; ++i) {
        Check(i < plan.partials_size && ++used[static_cast<size_t>(i)] == 1, where + ": partials");
      }
    }
    Check(chunks == plan.chunks, where + ": counters");
  }
}

int Main() {
  Random random(3);
  for (int i = 0; i < 150; ++i) {
    constexpr int64_t kHeads[] = {1, 3, 8, 33};
    const int64_t num_kv = kHeads[Below(random, 4)];
    Shape shape = MakeShape(1 + Below(random, 3), 1 + Below(random, i % 3 == 0 ? 90 : 3),
                            num_kv * (1 + Below(random, 5)), num_kv, 16 << Below(random, 5),
                            1 + Below(random, 1500));
    if (Below(random, 2) == 0) shape.window = 1 + Below(random, 400);
    std::vector<int32_t> positions;
    for (int64_t n = 0; n < shape.sequences * shape.queries; ++n) {
      positions.push_back(static_cast<int32_t>(Below(random, shape.block_rows + 3) - 2));
    }
    CheckPlan(shape, positions, "case " + std::to_string(i));
  }
  // Large calls use what there is; the partial results stay small beside the result.
  const Shape decode = MakeShape(1, 1, 32, 8, 128, 8192);
  const int32_t last = 8191;
  const Plan plan = MakePlan(decode, &last, 64);
  Check(plan.threads >= 16 && static_cast<int64_t>(plan.parts.size()) >= 2 * plan.threads,
        "one long sequence keeps many threads busy");
  const Shape prefill = MakeShape(1, 4096, 32, 8, 128, 100000);
  const std::vector<int32_t> all(4096, 99999);
  Check(MakePlan(prefill, all.data(), 64).partials_size == 0, "prefill needs no partial results");
  std::printf("parts cover every query, head and row once\n");
  return 0;
}

}  // namespace
}  // namespace jax_kvcache::decode_attention

int main() { return jax_kvcache::decode_attention::Main(); }
