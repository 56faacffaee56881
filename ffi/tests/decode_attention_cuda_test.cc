// Owns the test of the CUDA kernels of decode_attention, run on the host, against the rendering in
// float64: every head size, splits, masks, tables, windows, hostile values; and of how a call is
// divided among blocks of threads.
#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "cuda/decode_attention_call.h"
#include "tests/check.h"
#include "tests/decode_attention_cuda_kernels.h"
#include "tests/decode_attention_expected.h"
#include "tests/decode_attention_random_call.h"

namespace jax_kvcache::decode_attention {
namespace {

template <int... kDims>
std::vector<int64_t> ToVector(std::integer_sequence<int, kDims...> /*dims*/) {
  return {kDims...};
}

// Products of float16 factors lose more than products in float32 do, and what they lose is in
// proportion to the codes, also where the weighted codes cancel out.
constexpr Tolerance kTolerance = {2e-5, 0x1p-21, 0x1p-21, 0x1p-22, /*is_of_values=*/true};

// Each of a score's D / 8 sums drops less than a bit of what is there by then. With an outlier that
// is nearly all of the score, from the outlier on.
Tolerance WithOutlier(int64_t head_dim) {
  Tolerance tolerance = kTolerance;
  tolerance.per_term = static_cast<double>(head_dim) / 8 * 0x1p-23;
  return tolerance;
}

double CheckCall(RandomCall* owner, const Shape& shape, const std::string& where,
                 const Tolerance& tolerance = kTolerance) {
  const Call call = owner->View();
  return CheckResults(call, shape, Rendering(call, shape).Run(), tolerance, where);
}

// Runs a call on so many splits. `fewest_rows`: of a split, or 0 for the plan's.
void Run(RandomCall* owner, int64_t splits, uint32_t fewest_rows, Shape* shape) {
  const Call call = owner->View();
  const std::string error = Validate(call, shape);
  Check(error.empty(), error);
  int64_t size = owner->args[kQ].dims().back() + cuda::kExtras;
  for (size_t i = 0; i + 1 < owner->args[kQ].dims().size(); ++i) size *= owner->args[kQ].dims()[i];
  OwnedTensor scratch;
  scratch.Reset(DType::kF32, {splits > 1 ? splits * size : 0});
  for (uint8_t& byte : scratch.bytes()) byte = 0x7F;  // NaN
  for (OwnedTensor& result : owner->rets) {
    for (uint8_t& byte : result.bytes()) byte = 0x7F;
  }
  cuda::Arguments arguments;
  const std::string refusal = cuda::MakeArguments(call, *shape, scratch.View(), &arguments);
  Check(refusal.empty(), refusal);
  Check(int64_t{arguments.splits} == splits, "the number of splits is read off the scratch");
  if (fewest_rows > 0) arguments.fewest_rows = fewest_rows;
  std::vector<ptx::Array> arrays = {{scratch.bytes().data(), scratch.bytes().size(), false}};
  for (OwnedTensor& t : owner->args) arrays.push_back({t.bytes().data(), t.bytes().size(), true});
  for (OwnedTensor& t : owner->rets) arrays.push_back({t.bytes().data(), t.bytes().size(), false});
  RunKernels(arguments, arrays);
}

// Sizes that the host runs in little time. `seed` goes through the head sizes.
Sizes SmallSizes(Random& random, int seed) {
  const std::vector<int64_t> head_dims = ToVector(HeadDims());
  SizeChoices choices;
  choices.head_dims = {head_dims[static_cast<size_t>(seed) % head_dims.size()]};
  choices.queries = {1, 1, 2, 3, 4, 16};
  choices.q_heads_per_kv_head = {1, 2, 3, 4, 7, 8, 17};
  choices.block_rows = {1, 3, 16, 24, 128, 200};
  choices.rows = 200;
  return RandomSizes(random, choices);
}

void TestRandomCalls(int cases) {
  double worst = 0;
  for (int seed = 0; seed < cases; ++seed) {
    Random random(static_cast<uint32_t>(seed));
    constexpr float kFactors[] = {1.0f, 1.0f, 1.0f, 1e-6f, 1e4f};
    const Sizes sizes = SmallSizes(random, seed);
    Options options = RandomOptions(random, sizes.block_rows * sizes.table_blocks);
    options.q_factor = kFactors[Below(random, 5)];
    options.outlier = options.q_factor <= 1 && seed % 3 == 0 ? 1000 : 1;
    RandomCall call = MakeRandomCall(random, sizes, options);
    const int64_t splits = OneOf(random, {1, 1, 2, 3, 5});
    Shape shape;
    Run(&call, splits, static_cast<uint32_t>(OneOf(random, {0, 32, 64})), &shape);
    const Tolerance tolerance = options.outlier != 1 ? WithOutlier(shape.head_dim) : kTolerance;
    worst = std::fmax(worst, CheckCall(&call, shape, "seed " + std::to_string(seed), tolerance));
  }
  std::printf("%d calls, the largest error in float32 is %.3f of what is allowed\n", cases, worst);
}

// One sequence, whose query sees all rows of one block.
RandomCall OneBlock(Random& random, int64_t num_q_heads, int32_t rows, const Options& options) {
  RandomCall call = MakeRandomCall(random, {{}, 1, 1, num_q_heads, 1, 64, {1}, rows, 1}, options);
  call.args[kTable].Set<int32_t>(0, 0);
  call.args[kPositions].Set<int32_t>(0, rows - 1);
  return call;
}

// One row has nearly all of the weight, and what the many others have together must not be lost.
void TestFaintRows() {
  Random random(1);
  Options options;
  options.return_lse = true;
  RandomCall call = OneBlock(random, 4, 9000, options);
  call.scale = 1.0f;
  for (size_t i = 0; i < call.args[kKCache].Count(); ++i) {
    call.args[kKCache].Set<int8_t>(i, i < 64 ? 64 : -64);
  }
  for (size_t i = 0; i < call.args[kQ].Count(); ++i) call.args[kQ].Set(i, 0.1f);
  for (size_t i = 0; i < 64; ++i) call.args[kScaleK].Set(i, 9.0f / (0.1f * 64 * 64));
  // The first row's codes of V are small, so that the others' part is seen.
  for (size_t i = 0; i < call.args[kVCache].Count(); ++i) {
    call.args[kVCache].Set<int8_t>(i, i < 64 ? 0 : 127);
  }
  for (const int64_t splits : {1, 4}) {
    Shape shape;
    Run(&call, splits, 0, &shape);
    CheckCall(&call, shape, "faint rows");
  }
}

// The error of many sums in the tensor cores' arithmetic, and of a result that is a small
// difference of codes and offset.
void TestLongSequence() {
  for (const float offset : {0.0f, 100.0f}) {
    Random random(2);
    Options options;
    options.offset = true;
    options.return_lse = true;
    RandomCall call = OneBlock(random, 2, 30000, options);
    for (const Arg arg : {kOffsetK, kOffsetV}) {
      for (size_t i = 0; i < call.args[arg].Count(); ++i) call.args[arg].Set(i, offset);
    }
    for (const int64_t splits : {1, 8}) {
      Shape shape;
      Run(&call, splits, 0, &shape);
      const double worst = CheckCall(&call, shape, "a long sequence");
      std::printf(
          "30000 rows, offset %.0f, %d splits: the largest error is %.3f of what is allowed\n",
          static_cast<double>(offset), static_cast<int>(splits), worst);
    }
  }
}

// NaN and infinities of every kind end, and a query's do not reach another query.
void TestHostileNumbers(int cases) {
  for (int seed = 0; seed < cases; ++seed) {
    Random random(static_cast<uint32_t>(1000 + seed));
    const Sizes sizes = SmallSizes(random, seed);
    Options options = RandomOptions(random, sizes.block_rows * sizes.table_blocks);
    // Any table and positions, and any bits in some or all numbers: nothing is compared.
    options.hostile = true;
    RandomCall any = MakeRandomCall(random, sizes, options);
    for (const Arg arg : {kQ, kScaleK, kScaleV, kOffsetK, kOffsetV, kSinks}) {
      if (seed % 3 == 0) break;
      for (uint8_t& byte : any.args[arg].bytes()) byte = static_cast<uint8_t>(random());
    }
    Shape shape;
    Run(&any, 3, 32, &shape);

    options.hostile = false;
    options.dtype = DType::kF32;
    RandomCall call = MakeRandomCall(random, sizes, options);
    const auto columns = static_cast<size_t>(sizes.head_dim);
    const auto query_heads = static_cast<int64_t>(call.args[kQ].Count() / columns);
    const auto hostile = static_cast<size_t>(Below(random, query_heads));
    const float values[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-44f};
    RandomCall before = call;
    Run(&before, 1, 0, &shape);
    call.args[kQ].Set(hostile * columns + static_cast<size_t>(Below(random, 64)), values[seed % 6]);
    Run(&call, 1, 0, &shape);
    for (size_t i = 0; i < call.rets[kOut].Count(); ++i) {
      if (i / columns == hostile) continue;
      Check(call.rets[kOut].Get<uint32_t>(i) == before.rets[kOut].Get<uint32_t>(i),
            "a number of one query changes the results of another");
    }
  }
}

// A call of one sequence of `blocks` kv heads, with scratch for 128 splits.
cuda::Arguments ToDivide(int64_t blocks, int64_t rows) {
  cuda::Arguments arguments;
  arguments.shape.groups.count = 1;
  arguments.shape.sequences = 1;
  arguments.shape.queries = 1;
  arguments.shape.num_q_heads = blocks;
  arguments.shape.num_kv_heads = blocks;
  arguments.shape.head_dim = 128;
  arguments.shape.block_rows = rows;
  arguments.shape.table_blocks = 1;
  arguments.splits = 128;
  return arguments;
}

void TestChooseSplits() {
  constexpr int kCard = 132;  // multiprocessors
  constexpr int64_t kAtOnce = int64_t{kCard} * cuda::BlocksTogether(128);
  Random random(4);
  for (int i = 0; i < 1000; ++i) {
    cuda::Arguments a = ToDivide(1 + Below(random, 600), 1 + Below(random, 9000));
    a.splits = static_cast<uint32_t>(1 + Below(random, 128));
    if (i % 2 == 0) a.shape.window = 1 + Below(random, 300);
    const uint32_t splits = cuda::ChooseSplits(a, static_cast<int>(1 + Below(random, 200)));
    Check(1 <= splits && splits <= a.splits, "more splits than the scratch has, or none");
    const int64_t rows = a.shape.window == 0
                             ? a.shape.block_rows
                             : std::min(a.shape.block_rows, a.shape.window + a.shape.queries);
    Check(splits <= rows, "a split without a row");
  }
  for (const int64_t waves : {1, 2, 3, 50}) {
    Check(cuda::ChooseSplits(ToDivide(waves * kAtOnce, 100000), kCard) == 1,
          "blocks that fill the card are split");
  }
  Check(cuda::ChooseSplits(ToDivide(200 * kAtOnce + 1, 1000), kCard) == 1,
        "many more blocks than the card takes at once are split");
  Check(cuda::ChooseSplits(ToDivide(8, 100000), kCard) == kAtOnce / 8,
        "few blocks of long sequences are split into as many as fill the card");
  Check(cuda::ChooseSplits(ToDivide(kAtOnce + 1, 100000), kCard) > 1,
        "one block more than the card takes at once leaves it idle");
  Check(cuda::ChooseSplits(ToDivide(1, 5), kCard) == 5, "five rows are split into more or fewer");
  cuda::Arguments with_window = ToDivide(1, 100000);
  with_window.shape.window = 6;
  Check(cuda::ChooseSplits(with_window, kCard) == 7, "rows outside the window count");
  for (const int unknown : {0, -1}) {
    Check(cuda::ChooseSplits(ToDivide(kAtOnce, 5), unknown) == 128,
          "on an unknown card, there are not all of the scratch's splits");
  }
}

void TestRefusals() {
  Random random(3);
  RandomCall call = MakeRandomCall(random, {{}, 1, 1, 1, 1, 64, {2}, 16, 1}, Options());
  Call view = call.View();
  Shape shape;
  Check(Validate(view, &shape).empty(), "the call is valid");
  OwnedTensor scratch;
  scratch.Reset(DType::kF32, {65});
  cuda::Arguments arguments;
  Check(
      cuda::MakeArguments(view, shape, scratch.View(), &arguments) ==
          "decode_attention: `scratch` must have shape [splits * 68] and dtype float32, got [65].",
      "a scratch of another size is refused");
  scratch.Reset(DType::kF32, {0});
  view.args[kVCache].data = static_cast<char*>(view.args[kVCache].data) + 4;
  Check(cuda::MakeArguments(view, shape, scratch.View(), &arguments) ==
            "decode_attention: `v_cache` must begin at a multiple of 16 bytes for the CUDA kernel.",
        "a misaligned cache is refused");
  shape.head_dim = 72;
  Check(cuda::MakeArguments(view, shape, scratch.View(), &arguments) ==
            "decode_attention: `q` must have D = 64, 80, 96, 112, 128, 192 or 256 for the CUDA "
            "kernel, got 72.",
        "another head size is refused");
  view = call.View();
  std::vector<int64_t> taken;
  for (shape.head_dim = 1; shape.head_dim <= 1024; ++shape.head_dim) {
    if (cuda::MakeArguments(view, shape, scratch.View(), &arguments).empty()) {
      taken.push_back(shape.head_dim);
    }
  }
  Check(taken == ToVector(HeadDims()), "the head sizes that are taken are those tested here");
}

}  // namespace
}  // namespace jax_kvcache::decode_attention

int main(int argc, char** argv) {
  namespace attention = jax_kvcache::decode_attention;
  const int cases = argc > 1 ? std::atoi(argv[1]) : 210;
  attention::TestRefusals();
  attention::TestChooseSplits();
  attention::TestFaintRows();
  attention::TestLongSequence();
  attention::TestHostileNumbers(cases / 5);
  attention::TestRandomCalls(cases);
  return 0;
}
