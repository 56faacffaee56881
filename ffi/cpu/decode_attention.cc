// Owns the CPU handler of decode_attention.
#include "core/decode_attention.h"

#include <cstdint>
#include <utility>

#include "core/xla_call.h"
#include "cpu/decode_attention_kernel.h"
#include "cpu/decode_attention_plan.h"
#include "cpu/decode_attention_run.h"
#include "cpu/simd_level.h"

namespace jax_kvcache::decode_attention {
namespace {

namespace ffi = xla::ffi;

ffi::Error HandleCpu(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                     float scale, int64_t window, float soft_cap, bool return_lse) {
  Call call;
  call.scale = scale;
  call.window = window;
  call.soft_cap = soft_cap;
  call.return_lse = return_lse;
  Shape shape;
  ffi::Error error = ReadCall(kOperator, args, rets, &call, &shape);
  if (error.failure()) return error;
  const Buffers buffers = ToBuffers(call, shape);
  const Plan plan = MakePlan(shape, buffers.positions, pool.num_threads());
  const bool ran = RunCall(SelectKernel(ActiveSimd()), shape, buffers, plan,
                           [&](auto task) { pool.Schedule(std::move(task)); });
  if (!ran) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "decode_attention: there is no memory for the partial results.");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_kvcache::decode_attention

JAX_KVCACHE_EXPORT XLA_FFI_Error* decode_attention_cpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(decode_attention_cpu, jax_kvcache::decode_attention::HandleCpu,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("soft_cap")
                                  .Attr<bool>("return_lse"));
