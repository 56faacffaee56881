// Owns the division of a call into parts.
#include "cpu/dequant_rope_quant_kvcache_plan.h"

#include <algorithm>

#include "core/tensor.h"
#include "cpu/threads.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {
namespace {

// A thread that has done its own parts takes whole parts from another thread. Between 32 and 512 KB
// per part the time changes by a few percent: with smaller parts, two cores write to the same cache
// lines more often; with larger ones, threads wait longer for the last part.
constexpr int64_t kBytesPerPart = 128 << 10;

// The bytes that one token reads and writes. The parameters do not count: they stay in the
// processor's cache.
int64_t BytesPerToken(const Shape& shape) {
  const int64_t table_size = ItemSize(shape.table_dtype);
  const int64_t out_heads = shape.num_q_heads + (shape.kv_output ? 2 * shape.num_kv_heads : 0);
  const int64_t bytes_per_column = ItemSize(shape.x_dtype) * shape.num_heads() +
                                   table_size * (out_heads + 2) + 2 * shape.num_kv_heads;
  return bytes_per_column * shape.head_dim;
}

int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

Plan ByHeads(const Shape& shape, int64_t threads) {
  const int64_t heads = shape.num_heads();
  Plan plan;
  plan.by_heads = true;
  plan.per_part = CeilDivide(heads, threads);
  plan.count = CeilDivide(heads, plan.per_part);
  plan.threads = std::min(threads, plan.count);
  return plan;
}

}  // namespace

Part Plan::At(const Shape& shape, int64_t index) const {
  const int64_t tokens = shape.all_tokens();
  const int64_t heads = shape.num_heads();
  const int64_t begin = index * per_part;
  if (by_heads) return {0, tokens, begin, std::min(begin + per_part, heads)};
  return {begin, std::min(begin + per_part, tokens), 0, heads};
}

Plan MakePlan(const Shape& shape, const int32_t* slots, int64_t max_threads) {
  const int64_t tokens = shape.all_tokens();
  const int64_t token_bytes = BytesPerToken(shape);
  Plan plan;
  plan.per_part = tokens;
  plan.threads = WorthThreads(token_bytes * tokens, max_threads);
  if (plan.threads == 1) return plan;
  if (tokens < kTokensTogether * plan.threads) return ByHeads(shape, plan.threads);

  plan.per_part = CeilDivide(kBytesPerPart / token_bytes, kTokensTogether) * kTokensTogether;
  plan.per_part = std::clamp<int64_t>(plan.per_part, kTokensTogether, tokens / plan.threads);
  if (plan.per_part >= shape.tokens) {
    // Whole groups per part: each group has cache rows of its own.
    plan.per_part -= plan.per_part % shape.tokens;
  } else {
    for (int64_t group = 0; group < shape.groups.count; ++group) {
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

  // A hash table of 16 KiB on the stack, filled to about a half. More slots than that are divided
  // by some bits of their hash: one pass over all slots for each value of these bits.
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
      // The hash put too many slots into this pass: answer false before the table is full.
      if (++held > kPerPass * 3 / 2) return false;
    }
  }
  return true;
}

}  // namespace jax_kvcache::dequant_rope_quant_kvcache
