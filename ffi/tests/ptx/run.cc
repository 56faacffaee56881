// Owns how a block of threads runs a program.
#include <algorithm>

#include "tests/check.h"
#include "tests/ptx/program.h"

namespace jax_kvcache::ptx {
namespace {

// Those of `lanes` for which an instruction is done.
Lanes Chosen(const Instruction& instruction, const Warp& warp, Lanes lanes) {
  if (instruction.predicate == Instruction::kNoPredicate) return lanes;
  Lanes chosen = 0;
  ForEach(lanes, [&](int lane) {
    if (warp.Get<bool>(instruction.predicate, lane) != instruction.where_false) {
      chosen |= 1U << lane;
    }
  });
  return chosen;
}

// The lanes of `running` whose next instruction is the first in the text, and which it is.
struct Group {
  Lanes lanes = 0;
  size_t next = SIZE_MAX;
};
Group FirstInTheText(const Warp& warp, Lanes running) {
  Group group;
  ForEach(running, [&](int lane) {
    const size_t next = warp.next[static_cast<size_t>(lane)];
    if (next < group.next) group = {0, next};
    if (next == group.next) group.lanes |= 1U << lane;
  });
  return group;
}

// Until all lanes have come to a barrier, which is passed, or to the end. Returns whether they are
// at a barrier.
bool RunToBarrier(const Program& program, Warp* warp) {
  const auto go_on_at = [warp](Lanes lanes, size_t at) {
    ForEach(lanes, [&](int lane) { warp->next[static_cast<size_t>(lane)] = at; });
  };
  while (warp->running != 0) {
    auto [lanes, at] = FirstInTheText(*warp, warp->running);
    const size_t others_at = FirstInTheText(*warp, warp->running & ~lanes).next;
    // These lanes go on until they part, end, or meet others.
    bool together = true;
    while (together && at < others_at) {
      const Instruction& instruction = program.instructions.at(at);
      const Lanes chosen = Chosen(instruction, *warp, lanes);
      ++at;
      switch (instruction.kind) {
        case Instruction::Kind::kLanes:
          if (chosen != 0) instruction.operation(*warp, chosen);
          break;
        case Instruction::Kind::kWarp:
          if (chosen != kAllLanes) Fail("lanes come apart to " + instruction.text);
          instruction.operation(*warp, chosen);
          break;
        case Instruction::Kind::kBarrier:
          Check(chosen == kAllLanes, "lanes come apart to a barrier");
          go_on_at(lanes, at);
          return true;
        case Instruction::Kind::kJump:
          together = chosen == lanes || chosen == 0;
          if (chosen == lanes) at = instruction.jump_to;
          if (!together) go_on_at(chosen, instruction.jump_to);
          break;
        case Instruction::Kind::kEnd:
          warp->running &= ~chosen;
          together = chosen == 0;
          break;
      }
      if (!together) lanes &= ~chosen;
    }
    go_on_at(lanes, at);
  }
  return false;
}

void RunBlock(const Program& program, std::vector<Warp>* warps) {
  for (bool at_barrier = true; at_barrier; warps->front().block->shared.PassBarrier()) {
    at_barrier = RunToBarrier(program, &warps->front());
    for (size_t i = 1; i < warps->size(); ++i) {
      Check(RunToBarrier(program, &(*warps)[i]) == at_barrier,
            "warps wait at a barrier for warps that have ended");
    }
  }
}

}  // namespace

void RunBlocks(const Program& program, const std::vector<Array>& arrays,
               const std::vector<uint8_t>& parameters, int64_t blocks, int threads) {
  constexpr uint64_t kNan = 0x7FA5A5A57FA5A5A5;
  Check(parameters.size() == program.parameters_size, "another size of the parameters");
  Warp at_start;
  at_start.registers.resize(static_cast<size_t>(program.registers));
  for (Register& values : at_start.registers) values.fill(kNan);
  for (const auto& [index, value] : program.constants) {
    at_start.registers[static_cast<size_t>(index)].fill(value);
  }
  std::vector<Warp> warps(static_cast<size_t>(threads / kWarpLanes));
  for (int64_t i = 0; i < blocks; ++i) {
    Block block{arrays, parameters, SharedMemory(program.shared_size)};
    at_start.block = &block;
    at_start.first_thread = 0;
    for (Warp& warp : warps) {
      warp = at_start;
      ForEach(kAllLanes, [&](int lane) {
        warp.Set(program.block_register, lane, i);
        warp.Set(program.thread_register, lane, warp.first_thread + lane);
      });
      at_start.first_thread += kWarpLanes;
    }
    RunBlock(program, &warps);
  }
}

}  // namespace jax_kvcache::ptx
