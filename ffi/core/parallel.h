// Owns how the parts of a call run on a thread pool together with the calling thread.
#ifndef JAX_KVCACHE_FFI_CORE_PARALLEL_H_
#define JAX_KVCACHE_FFI_CORE_PARALLEL_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace jax_kvcache {

// The parts that one thread begins with. Other threads take parts from it when their own are done.
// Each range has a cache line to itself, because mostly one thread changes its counter.
struct alignas(64) PartRange {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

// Calls body(i) once for every i in [0, count) and returns when all these calls have returned.
// `schedule(task)` gives a task to the thread pool.
//
// Each thread begins with a run of neighbouring parts, and with the same run in every call: what it
// wrote in the last call is still in its core's cache, and two cores rarely write to the same cache
// line.
//
// The caller waits only for parts that another thread has begun, never for a task that is still in
// the pool's queue. So the call ends even if no pool thread is free, for example because all of
// them wait here. A task that starts after the end finds no part left; the ranges that it reads are
// on the heap because the caller's stack frame is gone by then.
template <typename Schedule, typename Body>
void RunParts(int64_t count, int64_t threads, const Schedule& schedule, const Body& body) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  // One range per thread, and a last one whose `next` counts the parts that have ended.
  const std::shared_ptr<PartRange[]> ranges(new PartRange[threads + 1]);
  for (int64_t t = 0; t < threads; ++t) {
    ranges[t].next = count * t / threads;
    ranges[t].end = count * (t + 1) / threads;
  }
  // `body` may be on the caller's stack: a task uses it only while it has a part that has not
  // ended, and the caller waits for that part.
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

#endif  // JAX_KVCACHE_FFI_CORE_PARALLEL_H_
