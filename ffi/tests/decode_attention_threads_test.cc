// Owns the test with eight callers of decode_attention at the same time, whose calls run on one
// pool, as under XLA. It is meant for ThreadSanitizer.
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/decode_attention_kernel.h"
#include "cpu/decode_attention_plan.h"
#include "cpu/decode_attention_run.h"
#include "tests/check.h"
#include "tests/decode_attention_random_call.h"
#include "tests/pool.h"

namespace jax_kvcache::decode_attention {
namespace {

// A call that is worth several threads, whose rows are in several chunks. Every other one has many
// queries.
RandomCall LargeCall(uint32_t seed) {
  Random random(seed);
  const Sizes sizes = seed % 2 == 0 ? Sizes{{}, 2, 1, 8, 4, 32, {40}, 64, 20}
                                    : Sizes{{2}, 1, 9, 4, 2, 32, {20}, 64, 20};
  Options options;
  options.return_lse = true;
  RandomCall call = MakeRandomCall(random, sizes, options);
  for (size_t i = 0; i < call.args[kPositions].Count(); ++i) {
    call.args[kPositions].Set(i, static_cast<int32_t>(1270 + i % 8));
  }
  return call;
}

void Run(Pool& pool, RandomCall* owner, int64_t threads) {
  const Shape shape = ShapeOf(owner);
  const Buffers buffers = ToBuffers(owner->View(), shape);
  Plan plan = MakePlan(shape, buffers.positions, threads);
  plan.threads = threads;  // more than so little work is worth
  const bool ran = RunCall(SelectKernel(ActiveSimd()), shape, buffers, plan,
                           [&](auto task) { pool.Schedule(std::move(task)); });
  Check(ran, "memory");
}

void Caller(Pool& pool, uint32_t first_seed, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const uint32_t seed = first_seed + static_cast<uint32_t>(round % 4);
    RandomCall serial = LargeCall(seed);
    RandomCall parallel = serial;
    Run(pool, &serial, 1);
    Run(pool, &parallel, 4);
    const std::string where = "seed " + std::to_string(seed);
    CheckSame(parallel.rets[kOut], serial.rets[kOut], where + ": out");
    CheckSame(parallel.rets[kLse], serial.rets[kLse], where + ": lse");
  }
}

int Main(int rounds) {
  Pool pool(3);
  std::vector<std::thread> callers;
  for (uint32_t i = 0; i < 8; ++i) {
    callers.emplace_back([&pool, i, rounds] { Caller(pool, 4 * i, rounds); });
  }
  for (std::thread& caller : callers) caller.join();
  std::printf("8 callers, %d rounds\n", rounds);
  return 0;
}

}  // namespace
}  // namespace jax_kvcache::decode_attention

int main(int argc, char** argv) {
  return jax_kvcache::decode_attention::Main(argc > 1 ? std::atoi(argv[1]) : 20);
}
