// Owns the CPU handler: checks the call, cuts it into parts, runs them on XLA's threads.
#include <sys/mman.h>

#include <cstdint>
#include <utility>

#include "kernel.h"
#include "parallel.h"
#include "plan.h"
#include "xla_call.h"

namespace jax_kvcache {
namespace {

namespace ffi = xla::ffi;

// glibc maps what is at least this large anew every time: pages that do not exist before they are
// written to.
constexpr int64_t kAlwaysFresh = 32 << 20;

// Finding a large result's pages 4 KB at a time takes longer than filling them. Where the system
// gives huge pages to those who ask, there are 512 times fewer to find; elsewhere this does
// nothing.
void AskForHugePages(const Tensor& result) {
  constexpr uintptr_t kHugePage = 2 << 20;
  const int64_t bytes = result.dims[0] * ItemSize(result.dtype);
  if (bytes < kAlwaysFresh) return;
  const auto begin = reinterpret_cast<uintptr_t>(result.data);
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
  auto* const pages = static_cast<char*>(result.data) + (first - begin);
  static_cast<void>(madvise(pages, last - first, MADV_HUGEPAGE));  // a wish
}

ffi::Error DequantRopeQuantKvcacheCpu(ffi::ThreadPool pool, ffi::RemainingArgs args,
                                      ffi::RemainingRets rets, bool kv_output) {
  Call call;
  Shape shape;
  ffi::Error error = ReadCall(args, rets, kv_output, &call, &shape);
  if (error.failure()) return error;
  const Buffers buffers = ToBuffers(call, shape);
  for (const Ret ret : {kQOut, kKOut, kVOut}) AskForHugePages(call.rets[ret]);
  const Kernel kernel = SelectKernel(ActiveSimd(), shape);
  const Plan plan = MakePlan(shape, buffers.slots, pool.num_threads());
  RunParts(
      plan.count, plan.threads, [&](auto task) { pool.Schedule(std::move(task)); },
      [&](int64_t i) { kernel(shape, buffers, plan.At(shape, i)); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_kvcache

JAX_KVCACHE_EXPORT XLA_FFI_Error* dequant_rope_quant_kvcache_cpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    dequant_rope_quant_kvcache_cpu, jax_kvcache::DequantRopeQuantKvcacheCpu,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<bool>(
        "kv_output"));
