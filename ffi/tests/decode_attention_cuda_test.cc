// Owns the test of the CUDA kernels of decode_attention, run on the host with the lanes of a warp
// in step, against the rendering in float64: every head size, splits, masks, tables, windows,
// hostile values.
#include <cmath>
#include <string>

#include "cuda/decode_attention_block.h"
#include "tests/check.h"
#include "tests/cuda_decode_attention_expected.h"
#include "tests/cuda_decode_attention_random_call.h"

namespace jax_kvcache::decode_attention {
namespace {

constexpr int64_t kHeadDims[] = {64, 80, 96, 112, 128, 192, 256};

template <int D>
void RunBlocks(const cuda::Arguments& arguments) {
  for (uint32_t block = 0; block < arguments.Blocks(); ++block) {
    cuda::Shared<D> shared;
    std::memset(static_cast<void*>(&shared), 0x7F, sizeof(shared));  // NaN
    cuda::Block<D>(arguments, block, &shared).Run();
  }
}

void RunKernels(const cuda::Arguments& arguments) {
  const Shape& shape = arguments.shape;
  switch (shape.head_dim) {
    case 64:
      RunBlocks<64>(arguments);
      break;
    case 80:
      RunBlocks<80>(arguments);
      break;
    case 96:
      RunBlocks<96>(arguments);
      break;
    case 112:
      RunBlocks<112>(arguments);
      break;
    case 128:
      RunBlocks<128>(arguments);
      break;
    case 192:
      RunBlocks<192>(arguments);
      break;
    default:
      RunBlocks<256>(arguments);
  }
  if (arguments.splits == 1) return;
  const int64_t threads = shape.groups.count * shape.sequences * shape.queries * shape.num_q_heads *
                          (shape.head_dim / cuda::kMergedColumns);
  for (uint32_t i = 0; i < threads + 5; ++i) cuda::MergeSplits(arguments, i);
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
  RunKernels(arguments);
}

void TestRandomCalls(int cases) {
  double worst = 0;
  for (int seed = 0; seed < cases; ++seed) {
    Random random(static_cast<uint32_t>(seed));
    constexpr float kSizes[] = {1.0f, 1.0f, 1.0f, 1e-6f, 1e4f};
    RandomCall call =
        MakeRandomCall(random, RandomSizes(random, kHeadDims[seed % 7]), kSizes[Below(random, 5)]);
    const int64_t splits = OneOf(random, {1, 1, 2, 3, 5});
    Shape shape;
    Run(&call, splits, static_cast<uint32_t>(OneOf(random, {0, 32, 64})), &shape);
    worst = std::fmax(worst, CheckResults(call.View(), shape, "seed " + std::to_string(seed)));
  }
  std::printf("%d calls, the largest error in float32 is %.3f of what is allowed\n", cases, worst);
}

// One row has nearly all of the weight, and what the many others have together must not be lost.
void TestFaintRows() {
  Random random(1);
  Sizes sizes = {{}, {1}, 1, 1, 4, 1, 64, 9000, 1};
  RandomCall call = MakeRandomCall(random, sizes, 1.0f);
  call.options.window = 0;
  call.options.soft_cap = 0;
  call.options.scale = 1.0f;
  call.args[kTable].Set<int32_t>(0, 0);
  call.args[kPositions].Set<int32_t>(0, 8999);
  for (size_t i = 0; i < call.args[kKCache].Count(); ++i) {
    call.args[kKCache].Set<int8_t>(i, i < 64 ? 64 : -64);
  }
  call.args[kQ].Reset(DType::kF32, {1, 1, 4, 64});
  call.rets[kOut].Reset(DType::kF32, {1, 1, 4, 64});
  for (size_t i = 0; i < call.args[kQ].Count(); ++i) call.args[kQ].Set(i, 0.1f);
  for (size_t i = 0; i < 64; ++i) call.args[kScaleK].Set(i, 9.0f / (0.1f * 64 * 64));
  // The first row's codes of V are small, so that the others' part is seen.
  for (size_t i = 0; i < call.args[kVCache].Count(); ++i) {
    call.args[kVCache].Set<int8_t>(i, i < 64 ? 0 : 127);
  }
  for (const int64_t splits : {1, 4}) {
    Shape shape;
    Run(&call, splits, 0, &shape);
    CheckResults(call.View(), shape, "faint rows");
  }
}

// The error of many sums in the tensor cores' arithmetic, and of a result that is a small
// difference of codes and offset.
void TestLongSequence() {
  for (const float offset : {0.0f, 100.0f}) {
    Random random(2);
    RandomCall call = MakeRandomCall(random, {{}, {1}, 1, 1, 2, 1, 64, 30000, 1}, 1.0f);
    call.options.window = 0;
    call.options.soft_cap = 0;
    call.args[kTable].Set<int32_t>(0, 0);
    call.args[kPositions].Set<int32_t>(0, 29999);
    call.args[kQ].Reset(DType::kF32, {1, 1, 2, 64});
    call.rets[kOut].Reset(DType::kF32, {1, 1, 2, 64});
    FillUniform(random, &call.args[kQ], -1, 1);
    for (const Arg arg : {kOffsetK, kOffsetV}) {
      call.args[arg].Reset(DType::kF32, {1, 64});
      FillUniform(random, &call.args[arg], offset, offset);
    }
    for (const int64_t splits : {1, 8}) {
      Shape shape;
      Run(&call, splits, 0, &shape);
      const double worst = CheckResults(call.View(), shape, "a long sequence");
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
    RandomCall call = MakeRandomCall(random, RandomSizes(random, kHeadDims[seed % 7]), 1.0f);
    RandomCall clean = call;
    call.args[kQ].Reset(DType::kF32, call.args[kQ].dims());
    call.rets[kOut].Reset(DType::kF32, call.args[kQ].dims());
    FillUniform(random, &call.args[kQ], -1, 1);
    const size_t columns = static_cast<size_t>(call.args[kQ].dims().back());
    const size_t hostile =
        static_cast<size_t>(Below(random, static_cast<int64_t>(call.args[kQ].Count() / columns)));
    const float values[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-44f};
    Shape shape;
    RandomCall before = call;
    Run(&before, 1, 0, &shape);
    call.args[kQ].Set(hostile * columns + static_cast<size_t>(Below(random, 64)), values[seed % 6]);
    Run(&call, 1, 0, &shape);
    for (size_t i = 0; i < call.rets[kOut].Count(); ++i) {
      if (i / columns == hostile) continue;
      Check(call.rets[kOut].Get<uint32_t>(i) == before.rets[kOut].Get<uint32_t>(i),
            "a number of one query changes the results of another");
    }
    // Any bits at all in the float operands: nothing is compared.
    for (const Arg arg : {kQ, kScaleK, kScaleV, kOffsetK, kOffsetV, kSinks}) {
      for (uint8_t& byte : clean.args[arg].bytes()) byte = static_cast<uint8_t>(random());
    }
    Run(&clean, 3, 32, &shape);
  }
}

void TestRefusals() {
  Random random(3);
  RandomCall call = MakeRandomCall(random, {{}, {2}, 1, 1, 1, 1, 64, 16, 1}, 1.0f);
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
}

}  // namespace
}  // namespace jax_kvcache::decode_attention

int main(int argc, char** argv) {
  namespace attention = jax_kvcache::decode_attention;
  const int cases = argc > 1 ? std::atoi(argv[1]) : 210;
  attention::TestRefusals();
  attention::TestFaintRows();
  attention::TestLongSequence();
  attention::TestHostileNumbers(cases / 5);
  attention::TestRandomCalls(cases);
  return 0;
}
