// Owns running the parts of a call on a pool's threads together with the calling one.
#ifndef JAX_KVCACHE_FFI_PARALLEL_H_
#define JAX_KVCACHE_FFI_PARALLEL_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace jax_kvcache {

// The parts that one thread begins with, and that others take from when they have done their own.
// A cache line each: its counter is mostly its owner's.
struct alignas(64) PartRange {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

// Calls body(i) once for every i in [0, count) and returns when all have ended. `schedule(task)`
// gives a task to the pool. Each thread begins with a run of neighbouring parts, the same in every
// call: what it wrote last time is still in its cache, and neighbours on different cores would take
// lines from each other. The caller waits only for parts that another thread has begun, never for a
// task still in the pool's queue: a busy pool, or one whose every thread is in here, cannot block
// it. A task that comes late finds nothing to do; the ranges it looks at are on the heap for that.
template <typename Schedule, typename Body>
void RunParts(int64_t count, int64_t threads, const Schedule& schedule, const Body& body) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  // One range per thread, and one whose `next` counts the parts that have ended.
  const std::shared_ptr<PartRange[]> ranges(new PartRange[threads + 1]);
  for (int64_t t = 0; t < threads; ++t) {
    ranges[t].next = count * t / threads;
    ranges[t].end = count * (t + 1) / threads;
  }
  // Captures `body`, which lives on the caller's stack, and looks at it only while holding a part.
  const auto work = [ranges, threads, &body](int64_t thread) {
    for (int64_t turn = 0; turn < threads; ++turn) {
      PartRange& range = ranges[(thread + turn) % threads];
      for (int64_t i = range.next.fetch_add(1, std::memory_order_relaxed); i < range.end;
           i = range.next.fetch_add(1, std::memory_order_relaxed)) {
        body(i);
        ranges[threads].next.fetch_add(1, std::memory_order_release);
      }
    }
  };
  for (int64_t t = 1; t < threads; ++t) schedule([work, t] { work(t); });
  work(0);
  for (int spins = 0; ranges[threads].next.load(std::memory_order_acquire) != count; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
}

}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_PARALLEL_H_
