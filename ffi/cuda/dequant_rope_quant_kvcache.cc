// Owns the CUDA handler of dequant_rope_quant_kvcache: it checks the call and puts the kernel on
// XLA's stream. It allocates nothing and waits for nothing, so that XLA may record it in a CUDA
// graph.
#include "core/dequant_rope_quant_kvcache.h"

#include <string>

#include "core/xla_call.h"
#include "cuda/dequant_rope_quant_kvcache_kernel.h"

namespace jax_kvcache::dequant_rope_quant_kvcache::cuda {
namespace {

namespace ffi = xla::ffi;

ffi::Error Run(jax_kvcache::cuda::Stream stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
               bool kv_output) {
  Call call;
  call.kv_output = kv_output;
  Shape shape;
  ffi::Error error = ReadCall(kOperator, args, rets, &call, &shape);
  if (error.failure()) return error;
  const Buffers buffers = ToBuffers(call, shape);
  const char* const failure = Launch(shape, buffers, MakePlan(shape, buffers), stream);
  if (failure == nullptr) return ffi::Error::Success();
  return ffi::Error::Internal(std::string(kOperator) +
                              ": the CUDA kernel was not launched: " + failure + ".");
}

}  // namespace
}  // namespace jax_kvcache::dequant_rope_quant_kvcache::cuda

JAX_KVCACHE_EXPORT XLA_FFI_Error* dequant_rope_quant_kvcache_cuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(dequant_rope_quant_kvcache_cuda,
                              jax_kvcache::dequant_rope_quant_kvcache::cuda::Run,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<jax_kvcache::cuda::Stream>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("kv_output"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
