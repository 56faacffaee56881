// Owns the interface of the CPU kernel of dequant_rope_quant_kvcache: pointers and a checked shape,
// nothing of XLA.
#ifndef JAX_KVCACHE_FFI_CPU_DEQUANT_ROPE_QUANT_KVCACHE_KERNEL_H_
#define JAX_KVCACHE_FFI_CPU_DEQUANT_ROPE_QUANT_KVCACHE_KERNEL_H_

#include <cstdint>

#include "core/dequant_rope_quant_kvcache.h"
#include "core/dequant_rope_quant_kvcache_buffers.h"
#include "cpu/simd_level.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {

// A part of a call: some of the G * T tokens, and some of the Nq + 2*Nkv heads that each token has
// in x, those of q first, then those of k, then those of v.
struct Part {
  int64_t token_begin;
  int64_t token_end;
  int64_t head_begin;
  int64_t head_end;
};

// The kernel processes this many tokens at a time, and what remains one by one, which is slower.
inline constexpr int kTokensTogether = 4;

// Computes one part on the calling thread, its tokens in order. Parts of one call may run at the
// same time if no two of them write the same bytes. Floating-point arithmetic must round to
// nearest; whether float32 subnormals are flushed to zero follows the thread's mode.
using Kernel = void (*)(const Shape& shape, const Buffers& buffers, const Part& part);

// The kernel for an instruction set and the shape's element types.
Kernel SelectKernel(Simd simd, const Shape& shape);

}  // namespace jax_kvcache::dequant_rope_quant_kvcache

#endif  // JAX_KVCACHE_FFI_CPU_DEQUANT_ROPE_QUANT_KVCACHE_KERNEL_H_
