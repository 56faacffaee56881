// Owns one whole call of decode_attention: its parts on a pool's threads, and the merge of each
// sequence's chunks by the thread that ends the last of them.
#ifndef JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_RUN_H_
#define JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_RUN_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "core/parallel.h"
#include "cpu/decode_attention_kernel.h"
#include "cpu/decode_attention_plan.h"

namespace jax_kvcache::decode_attention {

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};
using FloatMemory = std::unique_ptr<float[], FreeMemory>;

// Aligned to 64 bytes; null if there is no memory.
inline FloatMemory AllocateFloats(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
  return FloatMemory(static_cast<float*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64))));
}

// The scratch memory of the calling thread: it grows to what the largest part needs and is kept for
// later calls, since fresh pages take longer to get than a small call.
inline float* ThreadScratch(int64_t count) {
  thread_local FloatMemory memory;
  thread_local int64_t size = 0;
  if (count > size) {
    memory.reset();
    memory = AllocateFloats(count);
    size = memory == nullptr ? 0 : count;
  }
  return memory.get();
}

// Runs a checked call. `schedule(task)` gives a task to the pool. False if there is no memory.
template <typename Schedule>
bool RunCall(const Kernel& kernel, const Shape& shape, const Buffers& buffers, const Plan& plan,
             const Schedule& schedule) {
  const FloatMemory partials = AllocateFloats(plan.partials_size);
  const auto counters = static_cast<int64_t>(plan.chunks.size());
  const std::unique_ptr<std::atomic<int64_t>[]> left(
      new (std::nothrow) std::atomic<int64_t>[static_cast<size_t>(counters)]);
  if (partials == nullptr || left == nullptr) return false;
  for (int64_t i = 0; i < counters; ++i) left[i].store(plan.chunks[i], std::memory_order_relaxed);
  std::atomic<bool> has_memory{true};
  RunParts(static_cast<int64_t>(plan.parts.size()), plan.threads, schedule, [&](int64_t i) {
    const Part& part = plan.parts[i];
    float* const scratch = ThreadScratch(kernel.scratch_size(shape, part));
    if (scratch == nullptr) {
      has_memory.store(false, std::memory_order_relaxed);
      return;
    }
    kernel.run_part(shape, buffers, part, scratch, partials.get());
    if (part.chunks == 1) return;
    if (left[part.counter].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      kernel.merge_chunks(shape, buffers, part, scratch, partials.get());
    }
  });
  return has_memory.load(std::memory_order_relaxed);
}

}  // namespace jax_kvcache::decode_attention

#endif  // JAX_KVCACHE_FFI_CPU_DECODE_ATTENTION_RUN_H_
