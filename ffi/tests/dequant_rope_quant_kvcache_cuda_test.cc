// Owns the test of the CUDA kernel's threads, run on the host, against the scalar rendering. With
// the sanitizers it also shows that no thread leaves its arrays, and that no wide access is made
// where the address does not allow one.
#include <cstring>
#include <set>
#include <string>

#include "cuda/dequant_rope_quant_kvcache_plan.h"
#include "tests/check.h"
#include "tests/dequant_rope_quant_kvcache_cuda_threads.h"
#include "tests/dequant_rope_quant_kvcache_expected.h"
#include "tests/dequant_rope_quant_kvcache_random_call.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {
namespace {

std::vector<ptx::Array> ArraysOf(RandomCall* call) {
  std::vector<ptx::Array> arrays;
  for (size_t i = 0; i < kNumArgs; ++i) {
    std::vector<uint8_t>& bytes = call->args[i].bytes();
    arrays.push_back({bytes.data(), bytes.size(), i != kKCache && i != kVCache});
  }
  for (OwnedTensor& t : call->rets) arrays.push_back({t.bytes().data(), t.bytes().size(), false});
  return arrays;
}

// Threads run in any order: a row that several tokens of a group name may get parts of each.
void NameEachRowOnce(OwnedTensor* slots) {
  const auto tokens = static_cast<size_t>(slots->dims().back());
  std::set<int32_t> named;
  for (size_t i = 0; i < slots->Count(); ++i) {
    if (i % tokens == 0) named.clear();
    if (!named.insert(slots->Get<int32_t>(i)).second) slots->Set(i, INT32_MIN);
  }
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
  std::vector<ptx::Array> arrays = ArraysOf(&got);
  arrays.push_back({x.bytes.bytes().data(), x.bytes.bytes().size(), true});
  RunThreads(shape, buffers, plan, arrays);
  CheckSameResults(got, expected, where + ", misaligned");
}

int Main(int cases) {
  int wide = 0;
  for (int seed = 0; seed < cases; ++seed) {
    Random random(static_cast<uint32_t>(seed));
    Sizes sizes = RandomSizes(random);
    if (seed % 50 == 7) sizes.tokens = 600 + Below(random, 4);  // several per thread
    RandomCall call = MakeRandomCall(random, sizes, seed % 2 == 1);
    NameEachRowOnce(&call.args[kSlots]);
    RandomCall expected = call;
    Shape shape;
    const std::string error = Validate(expected.View(), &shape);
    Check(error.empty(), error);
    const std::string where = "seed " + std::to_string(seed);
    ComputeExpected(expected.View(), shape);
    RandomCall got = call;
    const Buffers buffers = ToBuffers(got.View(), shape);
    const cuda::Plan plan = cuda::MakePlan(shape, buffers);
    wide += plan.columns > 1 ? 1 : 0;
    RunThreads(shape, buffers, plan, ArraysOf(&got));
    CheckSameResults(got, expected, where);
    for (const int tokens_per_thread : {1, 2, 4}) {
      RandomCall other = call;
      const Buffers others = ToBuffers(other.View(), shape);
      RunThreads(shape, others, NarrowPlan(shape, tokens_per_thread), ArraysOf(&other));
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
