// Owns the split of a call over threads.
#include "plan.h"

#include <algorithm>

namespace jax_kvcache {
namespace {

// A parked pool thread takes 10 to 30 us to wake (a condition variable on a virtual machine), in
// which one thread moves 0.4 to 1 MB. Measured, two threads took this part of one thread's time:
// 0.9 at 0.7 MB, 0.8 to 1.1 at 1.3 MB, 0.8 at 2.7 MB, 0.7 at 5 MB, 0.55 at 10 MB.
constexpr int64_t kBytesPerThread = 512 << 10;

// A part is what a thread that is done may take from one that is not. From 32 to 512 KB the time
// changes by a few percent: the smaller ones for lines that two cores pull from each other, the
// larger ones for the wait at the end.
constexpr int64_t kBytesPerPart = 128 << 10;

// What one token reads and writes, parameters aside: they stay in the cache.
int64_t BytesPerToken(const Shape& shape) {
  const int64_t table_size = ItemSize(shape.table);
  const int64_t out_heads = shape.num_q + (shape.kv_output ? 2 * shape.num_kv : 0);
  const int64_t columns = ItemSize(shape.x) * shape.hidden() / shape.head_dim +
                          table_size * (out_heads + 2) + 2 * shape.num_kv;
  return columns * shape.head_dim;
}

int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

Plan ByHeads(const Shape& shape, int64_t threads) {
  const int64_t heads = shape.num_q + 2 * shape.num_kv;
  Plan plan;
  plan.by_heads = true;
  plan.per_part = CeilDivide(heads, threads);
  plan.count = CeilDivide(heads, plan.per_part);
  plan.threads = std::min(threads, plan.count);
  return plan;
}

}  // namespace

Part Plan::At(const Shape& shape, int64_t index) const {
  const int64_t tokens = shape.groups * shape.tokens;
  const int64_t heads = shape.num_q + 2 * shape.num_kv;
  const int64_t begin = index * per_part;
  if (by_heads) return {0, tokens, begin, std::min(begin + per_part, heads)};
  return {begin, std::min(begin + per_part, tokens), 0, heads};
}

int64_t WorthThreads(int64_t bytes, int64_t max_threads) {
  return std::clamp<int64_t>(bytes / kBytesPerThread, 1, std::max<int64_t>(max_threads, 1));
}

Plan MakePlan(const Shape& shape, const int32_t* slots, int64_t max_threads) {
  const int64_t tokens = shape.groups * shape.tokens;
  const int64_t token_bytes = BytesPerToken(shape);
  Plan plan;
  plan.per_part = tokens;
  plan.threads = WorthThreads(token_bytes * tokens, max_threads);
  if (plan.threads == 1) return plan;
  if (tokens < kTokensTogether * plan.threads) return ByHeads(shape, plan.threads);

  plan.per_part = CeilDivide(kBytesPerPart / token_bytes, kTokensTogether) * kTokensTogether;
  plan.per_part = std::clamp<int64_t>(plan.per_part, kTokensTogether, tokens / plan.threads);
  if (plan.per_part >= shape.tokens) {
    plan.per_part -= plan.per_part % shape.tokens;  // whole groups: their rows differ
  } else {
    for (int64_t group = 0; group < shape.groups; ++group) {
      if (!HasDistinctRows(slots + group * shape.tokens, shape.tokens, shape.rows)) {
        return ByHeads(shape, plan.threads);
      }
    }
  }
  plan.count = CeilDivide(tokens, plan.per_part);
  return plan;
}

bool HasDistinctRows(const int32_t* slots, int64_t count, int64_t rows) {
  const auto is_row = [rows](int32_t slot) { return slot >= 0 && slot < rows; };
  bool increasing = true;
  for (int64_t i = 1; i < count && increasing; ++i) increasing = slots[i - 1] < slots[i];
  if (increasing) return true;

  // A hash table on the stack, 16 KiB; more slots than half of it go in several passes.
  constexpr int kTableBits = 12;
  constexpr uint32_t kTableSize = 1U << kTableBits;
  constexpr int64_t kPerPass = kTableSize / 2;
  constexpr uint32_t kFibonacci = 2654435769U;  // 2^32 / golden ratio: spreads runs of rows
  int32_t table[kTableSize];
  int pass_bits = 0;
  while ((kPerPass << pass_bits) < count) ++pass_bits;
  if (pass_bits > 32 - kTableBits) return false;
  for (uint32_t pass = 0; pass < (1U << pass_bits); ++pass) {
    std::fill(table, table + kTableSize, -1);
    int64_t held = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (!is_row(slots[i])) continue;
      const uint32_t hash = static_cast<uint32_t>(slots[i]) * kFibonacci;
      const uint32_t low = hash >> (32 - kTableBits - pass_bits);
      if ((low & ((1U << pass_bits) - 1)) != pass) continue;
      uint32_t at = low >> pass_bits;
      while (table[at] >= 0 && table[at] != slots[i]) at = (at + 1) % kTableSize;
      if (table[at] == slots[i]) return false;
      table[at] = slots[i];
      if (++held > kPerPass * 3 / 2) return false;  // an unlucky hash: do not fill the table
    }
  }
  return true;
}

}  // namespace jax_kvcache
