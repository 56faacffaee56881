// Owns device memory that one call borrows from XLA.
#ifndef JAX_KVCACHE_FFI_ASCEND_SCRATCH_H_
#define JAX_KVCACHE_FFI_ASCEND_SCRATCH_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace jax_kvcache {

// XLA's scratch memory, aligned as asked for, and with XLA's message where XLA refuses. XLA takes
// it back in stream order, so that it may be destroyed when the work that uses it is enqueued.
class Scratch {
 public:
  Scratch(xla::ffi::ScratchAllocator allocator, const xla::ffi::DiagnosticEngine& diagnostic)
      : allocator_(std::move(allocator)), diagnostic_(diagnostic) {}

  // Returns the address of `size` bytes, which is a multiple of `alignment`, a power of two; or
  // null, and sets error().
  void* Allocate(size_t size, size_t alignment) {
    // XLA refuses to be asked for a higher alignment than this, and promises no higher one. So the
    // block has room to spare, and the address is rounded up.
    constexpr size_t kXlaAlignment = 16;
    const std::optional<void*> block = allocator_.Allocate(size + alignment, kXlaAlignment);
    if (!block.has_value() || *block == nullptr) {
      error_ = block.has_value() ? "XLA returned null" : diagnostic_.Result();
      return nullptr;
    }
    const auto address = reinterpret_cast<uintptr_t>(*block);
    const uintptr_t past = address % alignment;
    return static_cast<char*>(*block) + (past == 0 ? 0 : alignment - past);
  }

  const std::string& error() const { return error_; }

 private:
  xla::ffi::ScratchAllocator allocator_;
  const xla::ffi::DiagnosticEngine& diagnostic_;  // lives as long as the call
  std::string error_;
};

}  // namespace jax_kvcache

// Lets a handler take a Scratch: Ffi::Bind().Ctx<Scratch>(). The context's type has another name in
// newer headers.
template <>
struct xla::ffi::CtxDecoding<jax_kvcache::Scratch> {
  using Type = jax_kvcache::Scratch;

  template <typename Context>
  static std::optional<Type> Decode(const XLA_FFI_Api* api, Context* context,
                                    DiagnosticEngine& diagnostic) {
    auto allocator = CtxDecoding<ScratchAllocator>::Decode(api, context, diagnostic);
    if (!allocator.has_value()) return std::nullopt;
    return std::optional<Type>(std::in_place, *std::move(allocator), diagnostic);
  }
};

#endif  // JAX_KVCACHE_FFI_ASCEND_SCRATCH_H_
