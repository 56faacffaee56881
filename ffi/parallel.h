// Owns running the parts of a call on a pool's threads together with the calling one.
#ifndef JAX_KVCACHE_FFI_PARALLEL_H_
#define JAX_KVCACHE_FFI_PARALLEL_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace jax_kvcache {

// Calls body(i) once for every i in [0, count) and returns when all have ended. `schedule(task)`
// gives a task to the pool. The caller takes parts too and waits only for parts that another thread
// has begun, never for a task still in the pool's queue: a busy pool, or one whose every thread is
// in here, cannot block it. A task that comes late finds nothing to do; the counters it looks at
// are the one thing on the heap.
template <typename Schedule, typename Body>
void RunParts(int64_t count, int64_t threads, const Schedule& schedule, const Body& body) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct Counters {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };
  const auto counters = std::make_shared<Counters>();
  // Captures `body`, which lives on the caller's stack, and looks at it only while holding a part.
  const auto work = [counters, count, &body] {
    for (int64_t i = counters->next.fetch_add(1, std::memory_order_relaxed); i < count;
         i = counters->next.fetch_add(1, std::memory_order_relaxed)) {
      body(i);
      counters->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t t = 1; t < threads; ++t) schedule(work);
  work();
  for (int spins = 0; counters->done.load(std::memory_order_acquire) != count; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
}

}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_PARALLEL_H_
