// Owns the test of every variant of the kernel, whole and in parts, against the scalar rendering.
// It prints a hash of the results, which must be the same on every architecture.
#include "cpu/dequant_rope_quant_kvcache_kernel.h"

#include <cinttypes>
#include <string>

#include "cpu/dequant_rope_quant_kvcache_plan.h"
#include "tests/check.h"
#include "tests/dequant_rope_quant_kvcache_expected.h"
#include "tests/dequant_rope_quant_kvcache_random_call.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {
namespace {

Shape ShapeOf(RandomCall* call) {
  Shape shape;
  const std::string error = Validate(call->View(), &shape);
  Check(error.empty(), error);
  return shape;
}

void RunInParts(Simd simd, const Shape& shape, RandomCall* call, int64_t per_part, bool by_heads) {
  Plan plan;
  plan.per_part = per_part;
  plan.by_heads = by_heads;
  const int64_t all = by_heads ? shape.num_heads() : shape.all_tokens();
  plan.count = (all + per_part - 1) / per_part;
  const Buffers buffers = ToBuffers(call->View(), shape);
  for (int64_t i = 0; i < plan.count; ++i) {
    SelectKernel(simd, shape)(shape, buffers, plan.At(shape, i));
  }
}

int Main(int cases) {
  uint64_t hash = 0;
  int variants = 0;
  for (int seed = 0; seed < cases; ++seed) {
    Random random(static_cast<uint32_t>(seed));
    const RandomCall call = MakeRandomCall(random, RandomSizes(random), seed % 2 == 1);
    RandomCall expected = call;
    const Shape shape = ShapeOf(&expected);
    ComputeExpected(expected.View(), shape);
    variants = 0;
    for (int i = 0; i < static_cast<int>(Simd::kCount); ++i) {
      const Simd simd = static_cast<Simd>(i);
      if (!SimdSupported(simd)) continue;
      ++variants;
      const std::string where = std::string(SimdName(simd)) + ", seed " + std::to_string(seed);
      RandomCall whole = call;
      RunInParts(simd, shape, &whole, shape.all_tokens(), false);
      CheckSameResults(whole, expected, where);
      RandomCall by_tokens = call;
      RunInParts(simd, shape, &by_tokens, 1 + Below(random, 3), false);
      CheckSameResults(by_tokens, expected, where + ", by tokens");
      RandomCall by_heads = call;
      RunInParts(simd, shape, &by_heads, 1 + Below(random, 3), true);
      CheckSameResults(by_heads, expected, where + ", by heads");
    }
    hash ^= HashResults(expected) + static_cast<uint64_t>(seed);
  }
  std::printf("%d calls, %d variants, hash %016" PRIx64 "\n", cases, variants, hash);
  return 0;
}

}  // namespace
}  // namespace jax_kvcache::dequant_rope_quant_kvcache

int main(int argc, char** argv) {
  return jax_kvcache::dequant_rope_quant_kvcache::Main(argc > 1 ? std::atoi(argv[1]) : 2000);
}
