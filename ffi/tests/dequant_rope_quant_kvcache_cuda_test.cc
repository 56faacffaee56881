// Owns the test of the CUDA kernel's threads, run one after the other on the host, against the
// scalar rendering. With the sanitizers it also shows that no thread leaves its arrays, and that no
// wide access is made where the address does not allow one.
#include <cstring>
#include <string>

#include "cuda/dequant_rope_quant_kvcache_dispatch.h"
#include "cuda/dequant_rope_quant_kvcache_plan.h"
#include "tests/check.h"
#include "tests/dequant_rope_quant_kvcache_expected.h"
#include "tests/dequant_rope_quant_kvcache_random_call.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {
namespace {

void RunThreads(const Shape& shape, const Buffers& buffers, const cuda::Plan& plan) {
  cuda::Dispatch(shape, plan, [&](auto x, auto table, auto columns) {
    using Thread = cuda::Thread<typename decltype(x)::type, typename decltype(table)::type,
                                decltype(columns)::value>;
    // A grid's last block has threads past the end.
    for (int64_t i = 0; i < plan.threads + 5; ++i) {
      Thread(shape, buffers).Run(i, plan.tokens_per_thread);
    }
  });
}

cuda::Plan NarrowPlan(const Shape& shape, int tokens_per_thread) {
  cuda::Plan plan;
  plan.tokens_per_thread = tokens_per_thread;
  const int64_t runs = (shape.tokens + tokens_per_thread - 1) / tokens_per_thread;
  plan.threads = shape.groups.count * runs * shape.num_heads() * (shape.head_dim / 2);
  return plan;
}

// An array whose elements begin one element after an address that every access could take.
struct Shifted {
  OwnedTensor bytes;
  void* data = nullptr;

  explicit Shifted(OwnedTensor& of) {
    const auto size = static_cast<int64_t>(of.bytes().size());
    const int64_t item = ItemSize(of.dtype());
    bytes.Reset(DType::kS8, {size + item});
    data = bytes.bytes().data() + item;
    if (size > 0) std::memcpy(data, of.bytes().data(), static_cast<size_t>(size));
  }
};

void CheckMisalignedX(const RandomCall& call, const Shape& shape, const RandomCall& expected,
                      const std::string& where) {
  RandomCall got = call;
  Buffers buffers = ToBuffers(got.View(), shape);
  Shifted x(got.args[kX]);
  buffers.x = x.data;
  const cuda::Plan plan = cuda::MakePlan(shape, buffers);
  Check(plan.columns == 1, where + ": a wide plan for an address that is not a multiple of 16");
  RunThreads(shape, buffers, plan);
  CheckSameResults(got, expected, where + ", misaligned");
}

int Main(int cases) {
  int wide = 0;
  for (int seed = 0; seed < cases; ++seed) {
    Random random(static_cast<uint32_t>(seed));
    Sizes sizes = RandomSizes(random);
    if (seed % 100 == 7) sizes.tokens = 600;  // several tokens per thread
    const RandomCall call = MakeRandomCall(random, sizes, seed % 2 == 1);
    RandomCall expected = call;
    Shape shape;
    const std::string error = Validate(expected.View(), &shape);
    Check(error.empty(), error);
    const std::string where = "seed " + std::to_string(seed);
    // Of tokens with the same row the last one wins, because the threads run in order here.
    ComputeExpected(expected.View(), shape);
    RandomCall got = call;
    const Buffers buffers = ToBuffers(got.View(), shape);
    const cuda::Plan plan = cuda::MakePlan(shape, buffers);
    wide += plan.columns > 1 ? 1 : 0;
    RunThreads(shape, buffers, plan);
    CheckSameResults(got, expected, where);
    for (const int tokens_per_thread : {1, 2, 4}) {
      RandomCall other = call;
      const Buffers others = ToBuffers(other.View(), shape);
      RunThreads(shape, others, NarrowPlan(shape, tokens_per_thread));
      CheckSameResults(other, expected, where + ", one column per thread");
    }
    CheckMisalignedX(call, shape, expected, where);
  }
  std::printf("%d calls, %d with 16-byte accesses\n", cases, wide);
  Check(wide > cases / 4, "enough calls have 16-byte accesses");
  return 0;
}

}  // namespace
}  // namespace jax_kvcache::dequant_rope_quant_kvcache

int main(int argc, char** argv) {
  return jax_kvcache::dequant_rope_quant_kvcache::Main(argc > 1 ? std::atoi(argv[1]) : 1000);
}
