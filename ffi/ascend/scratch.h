// Owns device memory that one call borrows from XLA.
#ifndef JAX_KVCACHE_FFI_ASCEND_SCRATCH_H_
#define JAX_KVCACHE_FFI_ASCEND_SCRATCH_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace jax_kvcache {

// One block of device memory. XLA takes it back in stream order, so that it may be destroyed when
// the work that uses it is enqueued. It differs from xla::ffi::ScratchAllocator in that it aligns
// as asked for and keeps XLA's message when XLA refuses.
class Scratch {
 public:
  Scratch(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* ctx) : api_(api), ctx_(ctx) {}
  Scratch(Scratch&& other) noexcept
      : api_(other.api_), ctx_(other.ctx_), size_(other.size_), data_(other.data_) {
    other.data_ = nullptr;
  }
  ~Scratch() {
    if (data_ == nullptr) return;
    XLA_FFI_DeviceMemory_Free_Args args = {};
    args.struct_size = XLA_FFI_DeviceMemory_Free_Args_STRUCT_SIZE;
    args.ctx = ctx_;
    args.size = size_;
    args.data = data_;
    // There is nobody left to tell of an error.
    if (XLA_FFI_Error* error = api_->XLA_FFI_DeviceMemory_Free(&args)) TakeMessage(error);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  Scratch& operator=(Scratch&&) = delete;

  // Returns the address of `size` bytes, which is a multiple of `alignment`, a power of two; or
  // null, and sets error(). Called at most once.
  void* Allocate(size_t size, size_t alignment) {
    // XLA refuses to be asked for a higher alignment than this, and gives no higher one. So the
    // block has room to spare, and the address is rounded up.
    constexpr size_t kXlaAlignment = 16;
    XLA_FFI_DeviceMemory_Allocate_Args args = {};
    args.struct_size = XLA_FFI_DeviceMemory_Allocate_Args_STRUCT_SIZE;
    args.ctx = ctx_;
    args.size = size + alignment;
    args.alignment = kXlaAlignment;
    if (XLA_FFI_Error* error = api_->XLA_FFI_DeviceMemory_Allocate(&args)) {
      error_ = TakeMessage(error);
      return nullptr;
    }
    if (args.data == nullptr) {
      error_ = "XLA returned null";
      return nullptr;
    }
    size_ = args.size;
    data_ = args.data;
    const auto address = reinterpret_cast<uintptr_t>(data_);
    return reinterpret_cast<void*>((address + alignment - 1) & ~uintptr_t{alignment - 1});
  }

  const std::string& error() const { return error_; }

 private:
  std::string TakeMessage(XLA_FFI_Error* error) {
    XLA_FFI_Error_GetMessage_Args text = {};
    text.struct_size = XLA_FFI_Error_GetMessage_Args_STRUCT_SIZE;
    text.error = error;
    api_->XLA_FFI_Error_GetMessage(&text);
    std::string message = text.message == nullptr ? "" : text.message;
    if (message.empty()) message = "XLA gave no reason";
    XLA_FFI_Error_Destroy_Args destroy = {};
    destroy.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE;
    destroy.error = error;
    api_->XLA_FFI_Error_Destroy(&destroy);
    return message;
  }

  const XLA_FFI_Api* api_;
  XLA_FFI_ExecutionContext* ctx_;
  size_t size_ = 0;
  void* data_ = nullptr;
  std::string error_;
};

}  // namespace jax_kvcache

// Lets a handler take a Scratch: Ffi::Bind().Ctx<Scratch>().
template <>
struct xla::ffi::CtxDecoding<jax_kvcache::Scratch> {
  using Type = jax_kvcache::Scratch;

  static std::optional<Type> Decode(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* ctx,
                                    DiagnosticEngine&) {
    return std::optional<Type>(std::in_place, api, ctx);
  }
};

#endif  // JAX_KVCACHE_FFI_ASCEND_SCRATCH_H_
