// Owns the checks of memory accesses. They are many: only what fails makes a text.
#include "tests/ptx/machine.h"

#include <string>

#include "tests/check.h"

namespace jax_kvcache::ptx {
namespace {

void CheckAligned(uint64_t address, size_t size, const char* memory) {
  if (address % size == 0) return;
  Fail("an access of " + std::to_string(size) + " bytes to " + memory + " memory at " +
       std::to_string(address));
}

}  // namespace

uint8_t* SharedMemory::At(uint64_t address, size_t size, int thread, bool writes) {
  CheckAligned(address, size, "shared");
  if (address + size > bytes_.size()) Fail("an access outside of shared memory");
  for (size_t i = address; i < address + size; ++i) {
    Use& use = uses_[i];
    if (use.interval != interval_) use = {interval_, kNone, kNone};
    const bool after_write = use.writer != kNone && use.writer != thread;
    const bool after_read = use.reader != kNone && use.reader != thread;
    if (after_write || (writes && after_read)) {
      Fail("two threads use byte " + std::to_string(i) + " of shared memory, no barrier between");
    }
    if (writes) {
      use.writer = thread;
    } else {
      use.reader = after_read ? kSeveral : thread;
    }
  }
  return bytes_.data() + address;
}

uint8_t* Block::Global(uint64_t address, size_t size, bool writes, bool must_be_constant) const {
  CheckAligned(address, size, "global");
  for (const Array& array : arrays) {
    const auto begin = reinterpret_cast<uint64_t>(array.data);
    if (address < begin || address + size > begin + array.size) continue;
    if (writes && array.is_constant) Fail("a write to a constant array");
    if (must_be_constant && !array.is_constant) Fail("a read of a changing array as a constant");
    return reinterpret_cast<uint8_t*>(address);
  }
  Fail("an access outside of all arrays");
}

const uint8_t* Block::Parameter(uint64_t address, size_t size) const {
  CheckAligned(address, size, "parameter");
  if (address + size > parameters.size()) Fail("an access outside of the parameters");
  return parameters.data() + address;
}

}  // namespace jax_kvcache::ptx
