// Owns the CUDA handler of decode_attention: it checks the call and puts one or two kernels on
// XLA's stream. It allocates nothing and waits for nothing, so that XLA may record it in a CUDA
// graph; the partial results are in a result that XLA allocated.
#include "core/decode_attention.h"

#include <algorithm>
#include <iterator>
#include <string>

#include "core/xla_call.h"
#include "cuda/card.h"
#include "cuda/decode_attention_kernel.h"

namespace jax_kvcache::decode_attention::cuda {
namespace {

namespace ffi = xla::ffi;

ffi::Error Run(jax_kvcache::cuda::Stream stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
               float scale, int64_t window, float soft_cap, bool return_lse) {
  Call call;
  call.scale = scale;
  call.window = window;
  call.soft_cap = soft_cap;
  call.return_lse = return_lse;
  Tensor results[kNumRets + 1];  // the last one is the scratch
  ffi::Error read = ReadTensors(kOperator, args, rets, call.args, results);
  if (read.failure()) return read;
  std::copy(std::begin(results), std::end(results) - 1, call.rets);
  Shape shape;
  Arguments arguments;
  std::string error = Validate(call, &shape);
  if (error.empty()) error = MakeArguments(call, shape, results[kNumRets], &arguments);
  if (!error.empty()) return ffi::Error::InvalidArgument(std::move(error));
  arguments.splits = ChooseSplits(arguments, jax_kvcache::cuda::CountMultiprocessors());
  const char* const failure = Launch(arguments, stream);
  if (failure == nullptr) return ffi::Error::Success();
  return ffi::Error::Internal(std::string(kOperator) +
                              ": the CUDA kernel was not launched: " + failure + ".");
}

}  // namespace

const char* Launch(const Arguments& arguments, jax_kvcache::cuda::Stream stream) {
  const char* failure = nullptr;
  switch (arguments.shape.head_dim) {
    case 64:
      failure = LaunchBlocks<64>(arguments, stream);
      break;
    case 80:
      failure = LaunchBlocks<80>(arguments, stream);
      break;
    case 96:
      failure = LaunchBlocks<96>(arguments, stream);
      break;
    case 112:
      failure = LaunchBlocks<112>(arguments, stream);
      break;
    case 128:
      failure = LaunchBlocks<128>(arguments, stream);
      break;
    case 192:
      failure = LaunchBlocks<192>(arguments, stream);
      break;
    case 256:
      failure = LaunchBlocks<256>(arguments, stream);
      break;
    default:  // MakeArguments lets no other size through
      failure = "no kernel is compiled for this D";
  }
  if (failure != nullptr || arguments.splits == 1) return failure;
  return LaunchMerge(arguments, stream);
}

}  // namespace jax_kvcache::decode_attention::cuda

JAX_KVCACHE_EXPORT XLA_FFI_Error* decode_attention_cuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(decode_attention_cuda, jax_kvcache::decode_attention::cuda::Run,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<jax_kvcache::cuda::Stream>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("soft_cap")
                                  .Attr<bool>("return_lse"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
