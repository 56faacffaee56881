// Owns the test of how a call is divided: every token and head is in exactly one part, and tokens
// that name the same row are in one part or divided by heads.
#include "cpu/dequant_rope_quant_kvcache_plan.h"

#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "cpu/threads.h"
#include "tests/check.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {
namespace {

Shape MakeShape(int64_t groups, int64_t tokens, int64_t heads) {
  Shape shape;
  shape.groups.rank = 1;
  shape.groups.dims[0] = groups;
  shape.groups.count = groups;
  shape.tokens = tokens;
  shape.rows = 1 << 20;
  shape.num_q_heads = heads;
  shape.num_kv_heads = 1;
  shape.head_dim = 128;
  shape.x_dtype = DType::kS32;
  shape.table_dtype = DType::kBF16;
  shape.kv_output = true;
  return shape;
}

void TestCover(const Shape& shape, const std::vector<int32_t>& slots, int64_t threads) {
  const Plan plan = MakePlan(shape, slots.data(), threads);
  const int64_t tokens = shape.all_tokens();
  const int64_t heads = shape.num_heads();
  std::vector<int> seen(static_cast<size_t>(tokens * heads));
  for (int64_t i = 0; i < plan.count; ++i) {
    const Part part = plan.At(shape, i);
    Check(part.token_begin < part.token_end && part.head_begin < part.head_end, "an empty part");
    for (int64_t t = part.token_begin; t < part.token_end; ++t) {
      for (int64_t h = part.head_begin; h < part.head_end; ++h) {
        ++seen[static_cast<size_t>(t * heads + h)];
      }
    }
    // Two parts of one group must not write the same row at the same time.
    if (plan.count == 1 || plan.by_heads) continue;
    const bool whole_groups = part.token_begin % shape.tokens == 0 &&
                              (part.token_end % shape.tokens == 0 || part.token_end == tokens);
    for (int64_t t = part.token_begin; t < part.token_end && !whole_groups; ++t) {
      const int64_t group = t / shape.tokens;
      const std::set<int32_t> rows(slots.begin() + group * shape.tokens,
                                   slots.begin() + (group + 1) * shape.tokens);
      Check(static_cast<int64_t>(rows.size()) == shape.tokens, "duplicates split by tokens");
      t = (group + 1) * shape.tokens;
    }
  }
  for (const int count : seen) Check(count == 1, "each token and head once");
  Check(plan.threads >= 1 && plan.threads <= std::max<int64_t>(threads, 1), "number of threads");
}

void TestDistinct() {
  Random random(1);
  for (const int64_t count : {1, 2, 100, 2048, 2049, 20000}) {
    std::vector<int32_t> slots(static_cast<size_t>(count));
    std::iota(slots.begin(), slots.end(), 0);
    Check(HasDistinctRows(slots.data(), count, 1 << 20), "increasing rows are distinct");
    for (int64_t i = count - 1; i > 0; --i) {
      std::swap(slots[static_cast<size_t>(i)], slots[static_cast<size_t>(Below(random, i + 1))]);
    }
    Check(HasDistinctRows(slots.data(), count, 1 << 20), "a permutation is distinct");
    std::vector<int32_t> skipped = slots;
    for (int32_t& slot : skipped) slot = slot % 3 == 0 ? -1 : slot;
    Check(HasDistinctRows(skipped.data(), count, 1 << 20), "skipped tokens are no duplicates");
    Check(HasDistinctRows(std::vector<int32_t>(slots.size(), 9).data(), count, 9), "out of range");
    for (int trial = 0; trial < 8 && count > 1; ++trial) {
      std::vector<int32_t> twice = slots;
      const int64_t to = Below(random, count);
      twice[static_cast<size_t>(to)] =
          twice[static_cast<size_t>((to + 1 + Below(random, count - 1)) % count)];
      Check(!HasDistinctRows(twice.data(), count, 1 << 20), "one duplicate among many");
    }
  }
}

void TestThreads() {
  Check(WorthThreads(1000, 8) == 1, "little work stays on the calling thread");
  Check(WorthThreads(int64_t{1} << 40, 8) == 8, "no more threads than there are");
  Check(WorthThreads(int64_t{1} << 40, 0) == 1, "a pool that reports no threads");
  const Shape one = MakeShape(1, 1, 100000);
  const int32_t slot = 3;
  Check(MakePlan(one, &slot, 4).by_heads, "one wide token is split by heads");
  Check(MakePlan(one, &slot, 4).count == 4, "one wide token is split by heads");
}

int Main() {
  TestDistinct();
  TestThreads();
  Random random(2);
  for (int trial = 0; trial < 300; ++trial) {
    const Shape shape = MakeShape(1 + Below(random, trial % 3 == 0 ? 400 : 4),
                                  1 + Below(random, 200), 1 + Below(random, 40));
    std::vector<int32_t> slots(static_cast<size_t>(shape.all_tokens()));
    std::iota(slots.begin(), slots.end(), 0);
    if (trial % 2 == 0) {
      for (int32_t& s : slots) s = static_cast<int32_t>(Below(random, shape.rows >> (trial % 20)));
    }
    TestCover(shape, slots, 1 + Below(random, 9));
  }
  std::printf("plans cover their calls\n");
  return 0;
}

}  // namespace
}  // namespace jax_kvcache::dequant_rope_quant_kvcache

int main() { return jax_kvcache::dequant_rope_quant_kvcache::Main(); }
