// Owns the benchmark's handler that reads two caches and does nothing with them: how fast this
// machine reads.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <utility>

#include "core/parallel.h"
#include "core/xla_call.h"

namespace jax_kvcache {
namespace {

namespace ffi = xla::ffi;

// Bytes that are asked for ahead of those that are added: without that a core waits for memory.
constexpr int64_t kAhead = 4096;

// A cache line of words that are added at once.
using Words = uint64_t __attribute__((vector_size(64)));

// The sum of the 8-byte words, so that no byte is left unread.
uint64_t Sum(const int8_t* from, int64_t bytes) {
  constexpr int64_t kLine = sizeof(Words);
  Words even = {};
  Words odd = {};
  int64_t i = 0;
  for (; i + 2 * kLine <= bytes; i += 2 * kLine) {
    __builtin_prefetch(from + i + kAhead);
    __builtin_prefetch(from + i + kAhead + kLine);
    Words words[2];
    std::memcpy(words, from + i, sizeof(words));
    even += words[0];
    odd += words[1];
  }
  even += odd;
  uint64_t sum = 0;
  for (int64_t word = 0; word < kLine / 8; ++word) sum += even[word];
  for (; i < bytes; ++i) sum += static_cast<uint8_t>(from[i]);
  return sum;
}

// Result 0 is the sum of all words of both arrays, read on all threads of the pool.
ffi::Error Read(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> k_cache, ffi::Buffer<ffi::S8> v_cache,
                ffi::ResultBuffer<ffi::U32> result) {
  constexpr int64_t kPart = 256 << 10;
  std::atomic<uint64_t> total{0};
  for (const ffi::Buffer<ffi::S8>& cache : {k_cache, v_cache}) {
    const int64_t bytes = static_cast<int64_t>(cache.element_count());
    RunParts((bytes + kPart - 1) / kPart, pool.num_threads(),
             [&](auto task) { pool.Schedule(std::move(task)); },
             [&](int64_t i) {
               total += Sum(cache.typed_data() + i * kPart, std::min(kPart, bytes - i * kPart));
             });
  }
  result->typed_data()[0] = static_cast<uint32_t>(total.load());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_kvcache

JAX_KVCACHE_EXPORT XLA_FFI_Error* jax_kvcache_read(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_kvcache_read, jax_kvcache::Read,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S8>>()     // k_cache
                                  .Arg<xla::ffi::Buffer<xla::ffi::S8>>()     // v_cache
                                  .Ret<xla::ffi::Buffer<xla::ffi::U32>>());  // the sum
