// Owns the interface of the scalar rendering of dequant_rope_quant_kvcache, which computes one
// value at a time, in the order of the formulas. The stand-in device runs it, and the C++ tests
// compare the CPU kernel and the CUDA kernel with it.
#ifndef JAX_KVCACHE_FFI_STANDIN_DEQUANT_ROPE_QUANT_KVCACHE_H_
#define JAX_KVCACHE_FFI_STANDIN_DEQUANT_ROPE_QUANT_KVCACHE_H_

#include <cstdint>

namespace standin {

enum class Type { kInt32, kFloat16, kBfloat16, kFloat32 };

// A dense row-major array; null if an optional one is left out.
struct Array {
  void* data = nullptr;
  Type type = Type::kFloat32;
};

// One group's call: T tokens, each of which goes to one of C rows.
struct ScalarCall {
  int64_t tokens = 0;        // T
  int64_t rows = 0;          // C
  int64_t num_q_heads = 0;   // Nq
  int64_t num_kv_heads = 0;  // Nkv
  int64_t head_dim = 0;      // D

  Array x;                         // [T, H], H = (Nq + 2*Nkv) * D; int32: dequantised first
  Array cos;                       // [T, D]; float16: the rotation is computed in float16
  Array sin;                       // [T, D]
  int8_t* k_cache = nullptr;       // [C, Nkv, D]
  int8_t* v_cache = nullptr;       // [C, Nkv, D]
  const int32_t* slots = nullptr;  // [T]; outside [0, C): the token is not written
  Array scale_k;                   // [Nkv, D]
  Array scale_v;                   // [Nkv, D]
  Array offset_k;                  // [Nkv, D], optional
  Array offset_v;                  // [Nkv, D], optional
  Array weight_scale;              // [H], with an int32 x
  Array activation_scale;          // [T], optional
  Array bias;                      // [H], optional
  Array q;                         // [T, Nq, D]
  Array k;                         // [T, Nkv, D], optional
  Array v;                         // [T, Nkv, D], optional

  int64_t fused_width() const { return (num_q_heads + 2 * num_kv_heads) * head_dim; }  // H
};

// Computes the call. `row` is workspace for H floats.
void Execute(const ScalarCall& call, float* row);

}  // namespace standin

#endif  // JAX_KVCACHE_FFI_STANDIN_DEQUANT_ROPE_QUANT_KVCACHE_H_
