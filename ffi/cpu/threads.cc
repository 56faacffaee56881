// Owns the measured cost of waking a thread.
#include "cpu/threads.h"

#include <algorithm>

namespace jax_kvcache {
namespace {

// A sleeping pool thread takes 10 to 30 us to wake (a condition variable on a virtual machine). In
// that time one thread moves 0.4 to 1 MB. Measured, two threads took this fraction of one thread's
// time: 0.9 at 0.7 MB, 0.8 to 1.1 at 1.3 MB, 0.8 at 2.7 MB, 0.7 at 5 MB, 0.55 at 10 MB.
constexpr int64_t kBytesPerThread = 512 << 10;

}  // namespace

int64_t WorthThreads(int64_t bytes, int64_t max_threads) {
  return std::clamp<int64_t>(bytes / kBytesPerThread, 1, std::max<int64_t>(max_threads, 1));
}

}  // namespace jax_kvcache
