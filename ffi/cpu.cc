// Owns the CPU handler: checks the call, cuts it into parts, runs them on XLA's threads.
#include <utility>

#include "kernel.h"
#include "parallel.h"
#include "plan.h"
#include "xla_call.h"

namespace jax_kvcache {
namespace {

namespace ffi = xla::ffi;

ffi::Error DequantRopeQuantKvcacheCpu(ffi::ThreadPool pool, ffi::RemainingArgs args,
                                      ffi::RemainingRets rets, bool kv_output) {
  Call call;
  Shape shape;
  ffi::Error error = ReadCall(args, rets, kv_output, &call, &shape);
  if (error.failure()) return error;
  const Buffers buffers = ToBuffers(call, shape);
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
