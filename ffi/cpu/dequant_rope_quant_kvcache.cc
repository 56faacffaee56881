// Owns the CPU handler of dequant_rope_quant_kvcache: it checks the call, divides it into parts and
// runs them on XLA's threads.
#include "core/dequant_rope_quant_kvcache.h"

#include <sys/mman.h>

#include <cstdint>
#include <utility>

#include "core/parallel.h"
#include "core/xla_call.h"
#include "cpu/dequant_rope_quant_kvcache_kernel.h"
#include "cpu/dequant_rope_quant_kvcache_plan.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {
namespace {

namespace ffi = xla::ffi;

// For an allocation of this size or more, glibc takes new pages from the system every time: each
// page is created when it is first written.
constexpr int64_t kAlwaysNewPages = 32 << 20;

// Creating a large result's pages 4 KB at a time takes longer than computing the result. On systems
// that give huge pages of 2 MB to programs that ask, there are 512 times fewer pages to create; on
// other systems this has no effect.
void AskForHugePages(const Tensor& result) {
  constexpr uintptr_t kHugePage = 2 << 20;
  const int64_t bytes = result.dims[0] * ItemSize(result.dtype);
  if (bytes < kAlwaysNewPages) return;
  const auto begin = reinterpret_cast<uintptr_t>(result.data);
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
  auto* const pages = static_cast<char*>(result.data) + (first - begin);
  // A failure is ignored: it costs time only.
  static_cast<void>(madvise(pages, last - first, MADV_HUGEPAGE));
}

ffi::Error Run(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
               bool kv_output) {
  Call call;
  call.kv_output = kv_output;
  Shape shape;
  ffi::Error error = ReadCall(kOperator, args, rets, &call, &shape);
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
}  // namespace jax_kvcache::dequant_rope_quant_kvcache

JAX_KVCACHE_EXPORT XLA_FFI_Error* dequant_rope_quant_kvcache_cpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    dequant_rope_quant_kvcache_cpu, jax_kvcache::dequant_rope_quant_kvcache::Run,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<bool>(
        "kv_output"));
