// Owns what the instructions do that the lanes of a warp do together.
#include <algorithm>

#include "tests/check.h"
#include "tests/ptx/instructions.h"

namespace jax_kvcache::ptx {
namespace {

// All lanes must be named as those that take part.
void CheckMembers(const Warp& warp, int mask) {
  ForEach(kAllLanes, [&](int lane) {
    if (warp.Get<uint32_t>(mask, lane) != kAllLanes) Fail("a warp's operation leaves out lanes");
  });
}

// The lane whose value a lane is given. `limit` has the last lane of a segment in its bits 0 to 4,
// and in bits 8 to 12 those that are a segment's number.
int Source(bool is_butterfly, int lane, uint32_t operand, uint32_t limit) {
  const auto own = static_cast<uint32_t>(lane);
  const uint32_t segment = limit >> 8 & 31U;
  const uint32_t last = (own & segment) | (limit & 31U & ~segment);
  const uint32_t by = operand & 31U;
  const uint32_t source = is_butterfly ? own ^ by : (own & segment) | (by & ~segment);
  return static_cast<int>(source <= last ? source : own);
}

Operation MakeShuffle(const Operands& operands, bool is_butterfly) {
  // Whether the source is in the segment, which the kernels do not ask, may be the second.
  const size_t has_predicate = operands.registers.size() == 6 ? 1 : 0;
  const int to = operands[0];
  const int from = operands[1 + has_predicate];
  const int operand = operands[2 + has_predicate];
  const int limit = operands[3 + has_predicate];
  const int members = operands[4 + has_predicate];
  return [=](Warp& warp, Lanes /*all*/) {
    CheckMembers(warp, members);
    uint32_t values[kWarpLanes];
    ForEach(kAllLanes, [&](int lane) {
      const int source = Source(is_butterfly, lane, warp.Get<uint32_t>(operand, lane),
                                warp.Get<uint32_t>(limit, lane));
      values[lane] = warp.Get<uint32_t>(from, source);
    });
    ForEach(kAllLanes, [&](int lane) { warp.Set(to, lane, values[lane]); });
  };
}

Operation MakeBallot(const Operands& operands) {
  return [operands](Warp& warp, Lanes /*all*/) {
    CheckMembers(warp, operands[2]);
    uint32_t votes = 0;
    ForEach(kAllLanes,
            [&](int lane) { votes |= (warp.Get<bool>(operands[1], lane) ? 1U : 0U) << lane; });
    ForEach(kAllLanes, [&](int lane) { warp.Set(operands[0], lane, votes); });
  };
}

template <typename Choose>
Operation MakeReduction(const Operands& operands, const Choose& choose) {
  return [operands, choose](Warp& warp, Lanes /*all*/) {
    CheckMembers(warp, operands[2]);
    auto chosen = warp.Get<uint32_t>(operands[1], 0);
    ForEach(kAllLanes,
            [&](int lane) { chosen = choose(chosen, warp.Get<uint32_t>(operands[1], lane)); });
    ForEach(kAllLanes, [&](int lane) { warp.Set(operands[0], lane, chosen); });
  };
}

// The registers are 4 of D, 4 of A, 2 of B and 4 of C.
Operation MakeMma(const Operands& operands) {
  return [operands](Warp& warp, Lanes /*all*/) {
    cuda::PerLane<cuda::FragmentA> a;
    cuda::PerLane<cuda::FragmentB> b;
    cuda::PerLane<cuda::FragmentC> c;
    ForEach(kAllLanes, [&](int lane) {
      for (size_t i = 0; i < 4; ++i) a[lane].word[i] = warp.Get<uint32_t>(operands[4 + i], lane);
      for (size_t i = 0; i < 2; ++i) b[lane].word[i] = warp.Get<uint32_t>(operands[8 + i], lane);
      for (size_t i = 0; i < 4; ++i) c[lane].at[i] = warp.Get<float>(operands[10 + i], lane);
    });
    cuda::Mma(&c, a, b);
    ForEach(kAllLanes, [&](int lane) {
      for (size_t i = 0; i < 4; ++i) warp.Set(operands[i], lane, c[lane].at[i]);
    });
  };
}

}  // namespace

bool IsWarpWide(const std::string& name) {
  const std::string base = name.substr(0, name.find('.'));
  return base == "shfl" || base == "vote" || base == "redux" || base == "mma";
}

Operation MakeWarpOperation(const std::string& name, const Operands& operands) {
  if (name == "shfl.sync.bfly.b32") return MakeShuffle(operands, true);
  if (name == "shfl.sync.idx.b32") return MakeShuffle(operands, false);
  if (name == "vote.sync.ballot.b32") return MakeBallot(operands);
  if (name == "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32") return MakeMma(operands);
  if (name == "redux.sync.min.u32") {
    return MakeReduction(operands, [](uint32_t a, uint32_t b) { return std::min(a, b); });
  }
  if (name == "redux.sync.max.u32") {
    return MakeReduction(operands, [](uint32_t a, uint32_t b) { return std::max(a, b); });
  }
  Fail("an instruction that is not known: " + name);
}

}  // namespace jax_kvcache::ptx
