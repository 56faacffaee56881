// Owns the pointers of one checked call of dequant_rope_quant_kvcache, as the kernels get them.
#ifndef JAX_KVCACHE_FFI_CORE_DEQUANT_ROPE_QUANT_KVCACHE_BUFFERS_H_
#define JAX_KVCACHE_FFI_CORE_DEQUANT_ROPE_QUANT_KVCACHE_BUFFERS_H_

#include <cstdint>

#include "core/dequant_rope_quant_kvcache.h"

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

}  // namespace jax_kvcache::dequant_rope_quant_kvcache

#endif  // JAX_KVCACHE_FFI_CORE_DEQUANT_ROPE_QUANT_KVCACHE_BUFFERS_H_
