// Owns the interface of the CPU kernel of dequant_rope_quant_kvcache: pointers and a checked shape,
// nothing of XLA.
#ifndef JAX_KVCACHE_FFI_CPU_DEQUANT_ROPE_QUANT_KVCACHE_KERNEL_H_
#define JAX_KVCACHE_FFI_CPU_DEQUANT_ROPE_QUANT_KVCACHE_KERNEL_H_

#include <cstdint>

#include "core/dequant_rope_quant_kvcache.h"
#include "cpu/simd_level.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {

// The arrays of one checked call, with the element types that the shape names. Row dimensions are
// flattened to C. An optional array that is left out is null.
struct Buffers {
  const void* x = nullptr;                  // [*g, T, H]
  const void* cos = nullptr;                // [*g, T, D]
  const void* sin = nullptr;                // [*g, T, D]
  int8_t* k_cache = nullptr;                // [*g, C, Nkv, D]
  int8_t* v_cache = nullptr;                // [*g, C, Nkv, D]
  const int32_t* slots = nullptr;           // [*g, T]
  const float* scale_k = nullptr;           // [*g', Nkv, D]
  const float* scale_v = nullptr;           // [*g', Nkv, D]
  const float* offset_k = nullptr;          // [*g', Nkv, D], optional
  const float* offset_v = nullptr;          // [*g', Nkv, D], optional
  const float* weight_scale = nullptr;      // [*g', H], only with an int32 x
  const float* activation_scale = nullptr;  // [*g, T], optional
  const void* bias = nullptr;               // [*g', H], optional
  void* q = nullptr;                        // [*g, T, Nq, D]
  void* k = nullptr;                        // [*g, T, Nkv, D], only with kv_output
  void* v = nullptr;                        // [*g, T, Nkv, D], only with kv_output
};

Buffers ToBuffers(const Call& call, const Shape& shape);

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
