// Owns the test of every variant of the attention kernel against the rendering in double precision:
// random calls, and the calls that are hard to compute or easy to get wrong.
#include "cpu/decode_attention_kernel.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cpu/decode_attention_plan.h"
#include "cpu/decode_attention_run.h"
#include "tests/check.h"
#include "tests/decode_attention_expected.h"
#include "tests/decode_attention_random_call.h"

namespace jax_kvcache::decode_attention {
namespace {

// What float32 arithmetic loses, in parts of the largest result.
constexpr Tolerance kTolerance = {1e-5, 0x1p-22, 0, 0x1p-22, /*is_of_values=*/false};

// Whether an instruction set has a kernel of its own.
bool IsTested(Simd simd) { return SimdSupported(simd) && simd != Simd::kAvx512Bf16; }

void Run(Simd simd, const Shape& shape, RandomCall* call, int64_t threads) {
  const Buffers buffers = ToBuffers(call->View(), shape);
  const Plan plan = MakePlan(shape, buffers.positions, threads);
  // The parts of several threads, one after the other.
  const auto ignore = [](auto) {};
  Check(RunCall(SelectKernel(simd), shape, buffers, plan, ignore), "memory");
}

// Runs every variant and compares it. Returns the greatest error of a float32 call in units of what
// is allowed.
double CheckCall(const RandomCall& call, const std::string& where) {
  RandomCall first = call;
  const Shape shape = ShapeOf(&first);
  const Call view = first.View();
  const std::vector<Expected> expected = Rendering(view, shape).Run();
  double error = 0;
  for (int i = 0; i < static_cast<int>(Simd::kCount); ++i) {
    const Simd simd = static_cast<Simd>(i);
    if (!IsTested(simd)) continue;
    const std::string name = std::string(SimdName(simd)) + ", " + where;
    RandomCall got = call;
    Run(simd, shape, &got, 1);
    error = std::max(error, CheckResults(got.View(), shape, expected, kTolerance, name));
    for (const int64_t threads : {2, 64}) {
      RandomCall again = call;
      Run(simd, shape, &again, threads);
      CheckSame(again.rets[kOut], got.rets[kOut], name + ", more threads: out");
      CheckSame(again.rets[kLse], got.rets[kLse], name + ", more threads: lse");
    }
  }
  return error;
}

double TestRandomCalls(int cases) {
  double error = 0;
  for (int seed = 0; seed < cases; ++seed) {
    Random random(static_cast<uint32_t>(seed));
    const Sizes sizes = RandomSizes(random);
    const Options options = RandomOptions(random, sizes.block_rows * sizes.table_blocks);
    error = std::max(
        error, CheckCall(MakeRandomCall(random, sizes, options), "seed " + std::to_string(seed)));
  }
  return error;
}

// Many rows, of which every query sees all: offsets of 100 codes, scales that differ by a factor of
// two, and codes around the offset, where (code - offset) is small and the codes are not.
double TestLongSequence(int64_t rows) {
  double error = 0;
  for (const int variant : {0, 1, 2, 3}) {
    Random random(7);
    Sizes sizes = {{}, 1, variant < 2 ? 1 : 20, 1, 1, 32, {1}, rows, 1};
    Options options;
    options.offset = true;
    options.return_lse = true;
    RandomCall call = MakeRandomCall(random, sizes, options);
    for (size_t i = 0; i < call.args[kPositions].Count(); ++i) {
      call.args[kPositions].Set(i, static_cast<int32_t>(rows - 1));
    }
    call.args[kTable].Set(0, int32_t{0});
    for (const Arg arg : {kKCache, kVCache}) {
      for (uint8_t& byte : call.args[arg].bytes()) {
        if (variant % 2 == 1) byte = static_cast<uint8_t>(90 + Below(random, 21));
      }
      const Arg offset = arg == kKCache ? kOffsetK : kOffsetV;
      for (size_t i = 0; i < call.args[offset].Count(); ++i) {
        if (variant % 2 == 1) call.args[offset].Set(i, Uniform(random, 99, 101));
      }
    }
    error = std::max(error, CheckCall(call, "long " + std::to_string(variant)));
  }
  return error;
}

// A NaN or an infinity in one query row stays in the results of that row.
void TestContainment() {
  // The second NaN has bits that an addition to the exponent would carry into.
  const float kBad[] = {std::numeric_limits<float>::quiet_NaN(), standin::FloatFromBits(0x7FC00001),
                        std::numeric_limits<float>::infinity(),
                        -std::numeric_limits<float>::infinity()};
  for (uint32_t seed = 0; seed < 24; ++seed) {
    Random random(seed);
    const int64_t queries = seed % 2 == 0 ? 2 : 9;
    const Sizes sizes = {{}, 2, queries, 6, 2, seed % 3 == 0 ? 5 : 40, {2}, 300, 1};
    Options options;
    options.return_lse = true;
    options.offset = seed % 4 == 0;
    options.soft_cap = seed % 5 == 0 ? 20.0f : 0.0f;
    RandomCall call = MakeRandomCall(random, sizes, options);
    for (int32_t b = 0; b < 2; ++b) call.args[kTable].Set(static_cast<size_t>(b), b);
    for (size_t i = 0; i < call.args[kPositions].Count(); ++i) {
      call.args[kPositions].Set(i, static_cast<int32_t>(280 + i % 20));
    }
    const Shape shape = ShapeOf(&call);
    const auto d = static_cast<size_t>(sizes.head_dim);
    const auto rows = static_cast<int64_t>(call.args[kQ].Count() / d);
    const auto bad_row = static_cast<size_t>(Below(random, rows));
    for (int i = 0; i < static_cast<int>(Simd::kCount); ++i) {
      if (!IsTested(static_cast<Simd>(i))) continue;
      const std::string where = "containment, seed " + std::to_string(seed);
      RandomCall good = call;
      RandomCall bad = call;
      bad.args[kQ].Set(bad_row * d + static_cast<size_t>(Below(random, sizes.head_dim)),
                       kBad[seed % 4]);
      Run(static_cast<Simd>(i), shape, &good, 1);
      Run(static_cast<Simd>(i), shape, &bad, 1);
      for (size_t c = 0; c < d; ++c) {
        const float value = bad.rets[kOut].Get<float>(bad_row * d + c);
        Check(std::isnan(value), where + ": its own row is NaN");
        good.rets[kOut].Set(bad_row * d + c, value);
      }
      good.rets[kLse].Set(bad_row, bad.rets[kLse].Get<float>(bad_row));
      CheckSame(bad.rets[kOut], good.rets[kOut], where + ": out");
      CheckSame(bad.rets[kLse], good.rets[kLse], where + ": lse");
    }
  }
}

// Positions far behind the table's rows, scores far apart, and queries that see nothing.
double TestExtremes() {
  double error = 0;
  for (const int64_t queries : {1, 6}) {
    Random random(11);
    const Sizes sizes = {{}, 3, queries, 4, 2, 64, {5}, 32, 4};
    for (const float size : {1e-4f, 1.0f, 40.0f}) {
      Options options;
      options.return_lse = true;
      options.sinks = size == 1.0f;
      RandomCall call = MakeRandomCall(random, sizes, options);
      for (size_t i = 0; i < call.args[kQ].Count(); ++i) {
        call.args[kQ].Set(i, call.args[kQ].Get<float>(i) * size);
      }
      constexpr int32_t kPositionValues[] = {INT32_MAX, INT32_MAX - 1, 127, 128, -1, INT32_MIN, 0};
      for (size_t i = 0; i < call.args[kPositions].Count(); ++i) {
        call.args[kPositions].Set(i, kPositionValues[i % 7]);
      }
      for (const int64_t window : {int64_t{0}, int64_t{50}, int64_t{INT64_MAX}}) {
        call.window = window;
        error = std::max(error, CheckCall(call, "extremes, window " + std::to_string(window)));
      }
    }
  }
  return error;
}

int Main(int cases, int64_t rows) {
  double error = TestRandomCalls(cases);
  error = std::max(error, TestLongSequence(rows));
  error = std::max(error, TestExtremes());
  TestContainment();
  std::printf("%d random calls, %ld rows; the greatest error is %.2f of what is allowed\n", cases,
              static_cast<long>(rows), error);
  return 0;
}

}  // namespace
}  // namespace jax_kvcache::decode_attention

int main(int argc, char** argv) {
  return jax_kvcache::decode_attention::Main(argc > 1 ? std::atoi(argv[1]) : 400,
                                             argc > 2 ? std::atoi(argv[2]) : 100000);
}
