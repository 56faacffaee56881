// Owns the test with eight callers at the same time, whose calls run on one pool, as under XLA. It
// is meant for ThreadSanitizer.
#include <string>
#include <thread>
#include <vector>

#include "core/parallel.h"
#include "cpu/dequant_rope_quant_kvcache_kernel.h"
#include "cpu/dequant_rope_quant_kvcache_plan.h"
#include "tests/check.h"
#include "tests/dequant_rope_quant_kvcache_random_call.h"
#include "tests/pool.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {
namespace {

// One call of 1500 tokens, whose slots repeat in every other call.
RandomCall LargeCall(uint32_t seed) {
  Random random(seed);
  const Sizes sizes =
      seed % 2 == 0 ? Sizes{{}, {64, 32}, 1500, 4, 2, 64} : Sizes{{300}, {8}, 5, 4, 2, 64};
  RandomCall call = MakeRandomCall(random, sizes, false);
  for (size_t i = 0; i < call.args[kSlots].Count() && seed % 4 < 2; ++i) {
    call.args[kSlots].Set(i, static_cast<int32_t>(i % (seed % 2 == 0 ? 1024 : 5)));
  }
  return call;
}

void Run(Pool& pool, RandomCall* owner, int64_t threads) {
  const Call call = owner->View();
  Shape shape;
  const std::string error = Validate(call, &shape);
  Check(error.empty(), error);
  const Buffers buffers = ToBuffers(call, shape);
  const Plan plan = MakePlan(shape, buffers.slots, threads);
  const Kernel kernel = SelectKernel(ActiveSimd(), shape);
  RunParts(
      plan.count, plan.threads, [&](auto task) { pool.Schedule(std::move(task)); },
      [&](int64_t i) { kernel(shape, buffers, plan.At(shape, i)); });
}

void Caller(Pool& pool, uint32_t first_seed, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const uint32_t seed = first_seed + static_cast<uint32_t>(round % 4);
    RandomCall serial = LargeCall(seed);
    RandomCall parallel = serial;
    Run(pool, &serial, 1);
    Run(pool, &parallel, 4);
    // Also if several tokens name the same row: it then holds the last of them.
    CheckSameResults(parallel, serial, "seed " + std::to_string(seed));
  }
}

int Main(int rounds) {
  Pool pool(3);
  std::vector<std::thread> callers;
  for (uint32_t i = 0; i < 8; ++i) {
    callers.emplace_back([&pool, i, rounds] { Caller(pool, 4 * i, rounds); });
  }
  for (std::thread& caller : callers) caller.join();

  // The call ends although the pool never runs a task.
  const auto dropped = [](auto) {};
  int64_t sum = 0;
  RunParts(10, 4, dropped, [&](int64_t i) { sum += i; });
  Check(sum == 45, "all parts, without help from the pool");
  std::printf("8 callers, %d rounds\n", rounds);
  return 0;
}

}  // namespace
}  // namespace jax_kvcache::dequant_rope_quant_kvcache

int main(int argc, char** argv) {
  return jax_kvcache::dequant_rope_quant_kvcache::Main(argc > 1 ? std::atoi(argv[1]) : 20);
}
