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

// The sum of the 8-byte words, so that no byte is left unread.
uint64_t Sum(const int8_t* from, int64_t bytes) {
  uint64_t sums[8] = {};
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) {
    uint64_t words[8];
    std::memcpy(words, from + i, sizeof(words));
    for (int j = 0; j < 8; ++j) sums[j] += words[j];
  }
  for (; i < bytes; ++i) sums[0] += static_cast<uint8_t>(from[i]);
  for (int j = 1; j < 8; ++j) sums[0] += sums[j];
  return sums[0];
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
