// Owns the step from an XLA FFI call to a checked call of an operator, for every handler.
#ifndef JAX_KVCACHE_FFI_CORE_XLA_CALL_H_
#define JAX_KVCACHE_FFI_CORE_XLA_CALL_H_

#include <string>
#include <utility>

#include "core/tensor.h"
#include "xla/ffi/api/ffi.h"

// Declares a symbol that a library exports. XLA_FFI_DEFINE_HANDLER_SYMBOL defines a handler so
// declared.
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

// Reads exactly as many operands and results as the arrays hold. The tensors borrow XLA's
// dimensions and memory.
template <size_t kNumArgs, size_t kNumRets>
xla::ffi::Error ReadTensors(const char* operator_name, const xla::ffi::RemainingArgs& args,
                            const xla::ffi::RemainingRets& rets, Tensor (&arg_tensors)[kNumArgs],
                            Tensor (&ret_tensors)[kNumRets]) {
  if (args.size() != kNumArgs || rets.size() != kNumRets) {
    return xla::ffi::Error::InvalidArgument(
        std::string(operator_name) + ": takes " + std::to_string(kNumArgs) + " operands and " +
        std::to_string(kNumRets) + " results, got " + std::to_string(args.size()) + " and " +
        std::to_string(rets.size()) + ".");
  }
  for (size_t i = 0; i < kNumArgs; ++i) {
    const xla::ffi::ErrorOr<xla::ffi::AnyBuffer> buffer = args.get<xla::ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return buffer.error();
    arg_tensors[i] = ToTensor(*buffer);
  }
  for (size_t i = 0; i < kNumRets; ++i) {
    xla::ffi::ErrorOr<xla::ffi::Result<xla::ffi::AnyBuffer>> buffer =
        rets.get<xla::ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return buffer.error();
    ret_tensors[i] = ToTensor(**buffer);
  }
  return xla::ffi::Error::Success();
}

// Reads a call whose attributes `call` already has, and checks it with the operator's Validate.
template <typename Call, typename Shape>
xla::ffi::Error ReadCall(const char* operator_name, const xla::ffi::RemainingArgs& args,
                         const xla::ffi::RemainingRets& rets, Call* call, Shape* shape) {
  xla::ffi::Error read = ReadTensors(operator_name, args, rets, call->args, call->rets);
  if (read.failure()) return read;
  std::string error = Validate(*call, shape);
  if (!error.empty()) return xla::ffi::Error::InvalidArgument(std::move(error));
  return xla::ffi::Error::Success();
}

}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_CORE_XLA_CALL_H_
