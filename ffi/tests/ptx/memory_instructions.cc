// Owns what the instructions do that access memory.
#include <set>
#include <sstream>

#include "tests/check.h"
#include "tests/ptx/instructions.h"

namespace jax_kvcache::ptx {
namespace {

enum class Space { kGlobal, kShared, kParameter };

// An instruction's name, taken apart: ld.global.nc.v4.u32.
struct Access {
  Space space = Space::kGlobal;
  bool writes = false;
  bool must_be_constant = false;
  size_t elements = 1;
  std::string type;
};

Access TakeApart(const std::string& name) {
  Access access;
  std::istringstream parts(name);
  std::string part;
  std::getline(parts, part, '.');
  Check(part == "ld" || part == "st", "an instruction that is not known: " + name);
  access.writes = part == "st";
  std::getline(parts, part, '.');
  if (part == "shared") {
    access.space = Space::kShared;
  } else if (part == "param" && !access.writes) {
    access.space = Space::kParameter;
  } else {
    Check(part == "global", "an instruction that is not known: " + name);
  }
  const std::set<std::string> hints = {"L1::no_allocate"};
  while (std::getline(parts, part, '.')) {
    if (part == "nc") {
      access.must_be_constant = true;
    } else if (part == "v2" || part == "v4") {
      access.elements = part == "v2" ? 2 : 4;
    } else if (hints.count(part) == 0) {
      access.type = part;
    }
  }
  return access;
}

// The bytes at the address that a register has for a lane.
const uint8_t* ToRead(const Access& access, const Warp& warp, int lane, uint64_t address,
                      size_t size) {
  Block& block = *warp.block;
  switch (access.space) {
    case Space::kGlobal:
      return block.Global(address, size, false, access.must_be_constant);
    case Space::kShared:
      return block.shared.At(address, size, warp.first_thread + lane, false);
    default:
      return block.Parameter(address, size);
  }
}

uint8_t* ToWrite(const Access& access, const Warp& warp, int lane, uint64_t address, size_t size) {
  Block& block = *warp.block;
  if (access.space == Space::kGlobal) return block.Global(address, size, true, false);
  return block.shared.At(address, size, warp.first_thread + lane, true);
}

uint64_t AddressOf(const Access& access, const Warp& warp, int lane, int base, int64_t offset) {
  // An address in shared memory has 32 bits.
  const uint64_t address = access.space == Space::kShared ? warp.Get<uint32_t>(base, lane)
                                                          : warp.Get<uint64_t>(base, lane);
  return address + static_cast<uint64_t>(offset);
}

// A load names its results before the address, a store its values after it.
template <typename T>
Operation MakeAccess(const Access& access, const Operands& operands) {
  Check(operands.registers.size() == 1 + access.elements, "another number of operands");
  return [access, operands](Warp& warp, Lanes lanes) {
    const size_t size = sizeof(T) * access.elements;
    const int base = operands[access.writes ? 0 : access.elements];
    ForEach(lanes, [&](int lane) {
      const uint64_t address = AddressOf(access, warp, lane, base, operands.offset);
      T values[4];
      if (access.writes) {
        for (size_t i = 0; i < access.elements; ++i) {
          values[i] = warp.Get<T>(operands[1 + i], lane);
        }
        std::memcpy(ToWrite(access, warp, lane, address, size), values, size);
      } else {
        std::memcpy(values, ToRead(access, warp, lane, address, size), size);
        for (size_t i = 0; i < access.elements; ++i) warp.Set(operands[i], lane, values[i]);
      }
    });
  };
}

// A card ignores a request outside of all arrays, but a kernel has no reason to make one.
Operation MakePrefetch(const Operands& operands) {
  return [operands](Warp& warp, Lanes lanes) {
    ForEach(lanes, [&](int lane) {
      warp.block->Global(warp.Get<uint64_t>(operands[0], lane) + operands.offset, 1, false, true);
    });
  };
}

}  // namespace

Operation MakeMemoryOperation(const std::string& name, const Operands& operands) {
  if (name == "prefetch.global.L2") return MakePrefetch(operands);
  const Access access = TakeApart(name);
  const std::string& type = access.type;
  if (type == "u8" || type == "b8") return MakeAccess<uint8_t>(access, operands);
  if (type == "s8") return MakeAccess<int8_t>(access, operands);
  if (type == "u16" || type == "b16") return MakeAccess<uint16_t>(access, operands);
  if (type == "s16") return MakeAccess<int16_t>(access, operands);
  if (type == "u32" || type == "b32" || type == "f32") {
    return MakeAccess<uint32_t>(access, operands);
  }
  if (type == "s32") return MakeAccess<int32_t>(access, operands);
  if (type == "u64" || type == "b64" || type == "s64") {
    return MakeAccess<uint64_t>(access, operands);
  }
  Fail("an instruction that is not known: " + name);
}

}  // namespace jax_kvcache::ptx
