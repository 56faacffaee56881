// Owns the benchmark's empty handler: the cost of a call of dequant_rope_quant_kvcache without its
// work.
#include "core/xla_call.h"

namespace jax_kvcache {
namespace {

namespace ffi = xla::ffi;

ffi::Error DoNothing(ffi::ThreadPool, ffi::RemainingArgs, ffi::RemainingRets, bool) {
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_kvcache

JAX_KVCACHE_EXPORT XLA_FFI_Error* dequant_rope_quant_kvcache_empty(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    dequant_rope_quant_kvcache_empty, jax_kvcache::DoNothing,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<bool>(
        "kv_output"));
