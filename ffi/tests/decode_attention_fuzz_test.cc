// Owns the test with hostile calls of decode_attention: any table, positions and numbers, and up to
// three things made wrong. Each call must either be refused with a message that names the operator
// and an argument, or run without an access to memory outside its arrays, which the sanitizers
// detect.
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "cpu/decode_attention_kernel.h"
#include "cpu/decode_attention_plan.h"
#include "cpu/decode_attention_run.h"
#include "tests/check.h"
#include "tests/decode_attention_random_call.h"

namespace jax_kvcache::decode_attention {
namespace {

constexpr int64_t kHostileDims[] = {
    0, -1, 1, 2, 3, 5, 7, 1 << 20, 2147483647, 2147483648, 4294967297, INT64_MAX, INT64_MIN};
constexpr int kMaxRank = 24;

// The dimensions of the changed arrays.
struct HostileDims {
  int64_t dims[kNumArgs + kNumRets][kMaxRank];
};

void MutateAttribute(Random& random, Call* call) {
  constexpr float kFloats[] = {0.0f, -1.0f, 1e38f, std::numeric_limits<float>::infinity(),
                               std::numeric_limits<float>::quiet_NaN()};
  constexpr int64_t kWindows[] = {-1, 0, 1, INT64_MAX, INT64_MIN, 5};
  switch (Below(random, 4)) {
    case 0:
      call->scale = kFloats[Below(random, 5)];
      break;
    case 1:
      call->soft_cap = kFloats[Below(random, 5)];
      break;
    case 2:
      call->window = kWindows[Below(random, 6)];
      break;
    default:
      call->return_lse = !call->return_lse;
  }
}

void Mutate(Random& random, Call* call, HostileDims* storage) {
  const int which = static_cast<int>(Below(random, kNumArgs + kNumRets));
  Tensor& t = which < kNumArgs ? call->args[which] : call->rets[which - kNumArgs];
  int64_t* dims = storage->dims[which];
  if (t.dims != dims) std::memcpy(dims, t.dims, sizeof(int64_t) * static_cast<size_t>(t.rank));
  t.dims = dims;
  switch (Below(random, 7)) {
    case 0:  // another dtype
      t.dtype = static_cast<DType>(Below(random, 34));
      break;
    case 1:  // a hostile dimension
      if (t.rank > 0) dims[Below(random, t.rank)] = kHostileDims[Below(random, 13)];
      break;
    case 2:  // a dimension off by a little
      if (t.rank > 0) {
        int64_t& dim = dims[Below(random, t.rank)];
        if (!__builtin_add_overflow(dim, Below(random, 5) - 2, &dim)) break;
        dim = 0;
      }
      break;
    case 3:  // rank
      t.rank = Below(random, kMaxRank);
      for (int64_t i = 0; i < t.rank; ++i) dims[i] = i < 6 ? 1 + Below(random, 3) : 1;
      break;
    case 4:  // presence
      t.rank = 1;
      dims[0] = Below(random, 2);
      break;
    case 5:  // memory
      t.data = Below(random, 2) == 0 ? nullptr : call->args[Below(random, kNumArgs)].data;
      break;
    default:
      MutateAttribute(random, call);
  }
}

bool SameArray(const Tensor& a, const Tensor& b) {
  if (a.rank != b.rank || a.dtype != b.dtype || a.data != b.data) return false;
  for (int64_t i = 0; i < a.rank; ++i) {
    if (a.dims[i] != b.dims[i]) return false;
  }
  return true;
}

// Whether the call still describes the memory that it has, so that it may run.
bool MayRun(const Call& call, const Call& original) {
  for (int i = 0; i < kNumArgs; ++i) {
    if (!SameArray(call.args[i], original.args[i])) return false;
  }
  for (int i = 0; i < kNumRets; ++i) {
    if (!SameArray(call.rets[i], original.rets[i])) return false;
  }
  return true;
}

int Main(int count) {
  int refused = 0;
  int ran = 0;
  for (int seed = 0; seed < count; ++seed) {
    Random random(static_cast<uint32_t>(seed));
    const Sizes sizes = RandomSizes(random);
    Options options = RandomOptions(random, sizes.block_rows * sizes.table_blocks);
    options.hostile = true;
    RandomCall owner = MakeRandomCall(random, sizes, options);
    const Call original = owner.View();
    Call call = original;
    HostileDims storage;
    const int64_t mutations = Below(random, 4);
    for (int64_t i = 0; i < mutations; ++i) Mutate(random, &call, &storage);
    Shape shape;
    const std::string error = Validate(call, &shape);
    if (!error.empty()) {
      ++refused;
      const bool named = error.rfind("decode_attention: `", 0) == 0 && error.back() == '.';
      Check(named, "seed " + std::to_string(seed) + ": message: " + error);
      Check(mutations > 0, "seed " + std::to_string(seed) + ": refused a valid call: " + error);
      continue;
    }
    if (!MayRun(call, original)) continue;  // a valid call, but of other arrays than these
    ++ran;
    const Buffers buffers = ToBuffers(call, shape);
    const Plan plan = MakePlan(shape, buffers.positions, 1 + Below(random, 8));
    const Simd simd = static_cast<Simd>(Below(random, 1 + static_cast<int64_t>(ActiveSimd())));
    Check(RunCall(SelectKernel(simd), shape, buffers, plan, [](auto) {}), "memory");
  }
  std::printf("%d calls: %d refused, %d run\n", count, refused, ran);
  Check(refused > count / 4 && ran > count / 10, "enough calls are refused, and enough run");
  return 0;
}

}  // namespace
}  // namespace jax_kvcache::decode_attention

int main(int argc, char** argv) {
  return jax_kvcache::decode_attention::Main(argc > 1 ? std::atoi(argv[1]) : 3000);
}
