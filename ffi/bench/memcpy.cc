// Owns the benchmark's handler that copies memory: how fast this machine reads and writes.
#include <algorithm>
#include <cstring>
#include <utility>

#include "core/parallel.h"
#include "core/xla_call.h"

namespace jax_kvcache {
namespace {

namespace ffi = xla::ffi;

// Copies operand 0 over operand 1, which result 0 aliases, on at most `threads` threads. The
// operands and results after these have no other purpose than to make the call itself as expensive
// as the operator's.
ffi::Error Copy(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> from, ffi::Buffer<ffi::U8> to,
                ffi::RemainingArgs, ffi::ResultBuffer<ffi::U8> result, ffi::RemainingRets,
                int64_t threads) {
  if (to.typed_data() != result->typed_data() || from.element_count() != to.element_count()) {
    return ffi::Error::InvalidArgument(
        "memcpy: takes two arrays of one size, the second in place.");
  }
  constexpr int64_t kPart = 64 << 10;
  const int64_t bytes = static_cast<int64_t>(from.element_count());
  RunParts((bytes + kPart - 1) / kPart, std::min(threads, pool.num_threads()),
           [&](auto task) { pool.Schedule(std::move(task)); },
           [&](int64_t i) {
             std::memcpy(to.typed_data() + i * kPart, from.typed_data() + i * kPart,
                         static_cast<size_t>(std::min(kPart, bytes - i * kPart)));
           });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_kvcache

JAX_KVCACHE_EXPORT XLA_FFI_Error* jax_kvcache_memcpy(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_kvcache_memcpy, jax_kvcache::Copy,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()  // from
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()  // to
                                  .RemainingArgs()
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>()  // to
                                  .RemainingRets()
                                  .Attr<int64_t>("threads"));
