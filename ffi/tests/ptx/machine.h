// Owns the state of a block of threads that runs PTX, the virtual machine code that nvcc compiles a
// kernel to: registers, and memory in which what a kernel must not do fails.
#ifndef JAX_KVCACHE_FFI_TESTS_PTX_MACHINE_H_
#define JAX_KVCACHE_FFI_TESTS_PTX_MACHINE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cuda/warp.h"

namespace jax_kvcache::ptx {

using cuda::kWarpLanes;

// A bit for each lane of a warp.
using Lanes = uint32_t;
inline constexpr Lanes kAllLanes = 0xFFFFFFFFU;

template <typename Body>
void ForEach(Lanes lanes, const Body& body) {
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if ((lanes >> lane & 1) != 0) body(lane);
  }
}

// Memory that a kernel may read, and may write where it is not constant.
struct Array {
  const void* data;
  size_t size;  // bytes
  bool is_constant;
};

// A block's shared memory. Between two barriers, a byte that one thread writes is neither read nor
// written by another.
class SharedMemory {
 public:
  explicit SharedMemory(size_t size) : bytes_(size, 0x7F), uses_(size) {}

  // Checks an access and returns its place.
  uint8_t* At(uint64_t address, size_t size, int thread, bool writes);
  void PassBarrier() { ++interval_; }

 private:
  struct Use {
    uint32_t interval = 0;  // of the two threads
    int writer = kNone;
    int reader = kNone;
  };
  static constexpr int kNone = -1;
  static constexpr int kSeveral = -2;

  std::vector<uint8_t> bytes_;
  std::vector<Use> uses_;
  uint32_t interval_ = 1;
};

struct Block {
  const std::vector<Array>& arrays;
  const std::vector<uint8_t>& parameters;
  SharedMemory shared;

  // Checks an access to global memory and returns its place.
  uint8_t* Global(uint64_t address, size_t size, bool writes, bool must_be_constant) const;
  const uint8_t* Parameter(uint64_t address, size_t size) const;
};

// A register has the bits of a value of any type in its low bits.
using Register = std::array<uint64_t, kWarpLanes>;

struct Warp {
  Block* block = nullptr;
  int first_thread = 0;
  std::vector<Register> registers;
  std::array<size_t, kWarpLanes> next = {};  // instruction of each lane
  Lanes running = kAllLanes;

  template <typename T>
  T Get(int index, int lane) const {
    const uint64_t bits = registers[static_cast<size_t>(index)][static_cast<size_t>(lane)];
    if constexpr (std::is_same_v<T, bool>) {
      return (bits & 1) != 0;
    } else {
      T value;
      std::memcpy(&value, &bits, sizeof(T));
      return value;
    }
  }

  // Signed integers fill the register, because a load may have a register wider than its type.
  template <typename T>
  void Set(int index, int lane, T value) {
    uint64_t bits = 0;
    if constexpr (std::is_integral_v<T>) {
      bits = static_cast<uint64_t>(value);
    } else {
      std::memcpy(&bits, &value, sizeof(T));
    }
    registers[static_cast<size_t>(index)][static_cast<size_t>(lane)] = bits;
  }
};

}  // namespace jax_kvcache::ptx

#endif  // JAX_KVCACHE_FFI_TESTS_PTX_MACHINE_H_
