// Owns the step from an XLA FFI call frame to a checked canonical call, shared by every handler.
#ifndef JAX_KVCACHE_FFI_XLA_CALL_H_
#define JAX_KVCACHE_FFI_XLA_CALL_H_

#include <string>
#include <utility>

#include "canonical.h"
#include "xla/ffi/api/ffi.h"

// Declares a handler symbol that the library exports; XLA_FFI_DEFINE_HANDLER_SYMBOL then defines
// it.
#define JAX_KVCACHE_EXPORT extern "C" __attribute__((visibility("default")))

namespace jax_kvcache {

static_assert(static_cast<int>(DType::kS8) == static_cast<int>(xla::ffi::DataType::S8));
static_assert(static_cast<int>(DType::kS32) == static_cast<int>(xla::ffi::DataType::S32));
static_assert(static_cast<int>(DType::kF16) == static_cast<int>(xla::ffi::DataType::F16));
static_assert(static_cast<int>(DType::kF32) == static_cast<int>(xla::ffi::DataType::F32));
static_assert(static_cast<int>(DType::kBF16) == static_cast<int>(xla::ffi::DataType::BF16));

inline Tensor ToTensor(const xla::ffi::AnyBuffer& buffer) {
  const xla::ffi::AnyBuffer::Dimensions dims = buffer.dimensions();
  return {buffer.untyped_data(), dims.begin(), static_cast<int64_t>(dims.size()),
          static_cast<DType>(buffer.element_type())};
}

// Reads and checks the operands, results and attribute of one call. On success `call` borrows the
// frame's dimensions and buffers.
inline xla::ffi::Error ReadCall(const xla::ffi::RemainingArgs& args,
                                const xla::ffi::RemainingRets& rets, bool kv_output, Call* call,
                                Shape* shape) {
  if (args.size() != kNumArgs || rets.size() != kNumRets) {
    return xla::ffi::Error::InvalidArgument(
        std::string(kOperator) + ": takes " + std::to_string(kNumArgs) + " operands and " +
        std::to_string(kNumRets) + " results, got " + std::to_string(args.size()) + " and " +
        std::to_string(rets.size()) + ".");
  }
  for (int i = 0; i < kNumArgs; ++i) {
    const xla::ffi::ErrorOr<xla::ffi::AnyBuffer> buffer = args.get<xla::ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return buffer.error();
    call->args[i] = ToTensor(*buffer);
  }
  for (int i = 0; i < kNumRets; ++i) {
    xla::ffi::ErrorOr<xla::ffi::Result<xla::ffi::AnyBuffer>> buffer =
        rets.get<xla::ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return buffer.error();
    call->rets[i] = ToTensor(**buffer);
  }
  call->kv_output = kv_output;
  std::string error = Validate(*call, shape);
  if (!error.empty()) return xla::ffi::Error::InvalidArgument(std::move(error));
  return xla::ffi::Error::Success();
}

}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_XLA_CALL_H_
