// Owns the native call of dequant_rope_quant_kvcache: its operands and results, its shape, and the
// checks that every platform makes first.
#ifndef JAX_KVCACHE_FFI_CORE_DEQUANT_ROPE_QUANT_KVCACHE_H_
#define JAX_KVCACHE_FFI_CORE_DEQUANT_ROPE_QUANT_KVCACHE_H_

#include <cstdint>
#include <string>

#include "core/groups.h"
#include "core/tensor.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {

// The FFI target's name on every platform, and the first word of every error.
inline constexpr char kOperator[] = "dequant_rope_quant_kvcache";

// Operands in the order of the call, each with "dimensions; element types". A test compares the
// names, the order and the dimensions with the Python package's table of operands.
//
// Arrays are row-major and dense. *g: group dimensions, possibly none, G groups in all; *g': as
// many dimensions, each 1 (shared by all groups) or that of g; *r: row dimensions, at least one, C
// rows per group in all; T tokens per group; H = (Nq + 2*Nkv) * D columns. "flat": passed with one
// dimension, because XLA would copy some of these arrays to give them more. "or [0]": optional.
enum Arg : int {
  kX,                // [*g, T, H]; int32, float16, bfloat16, float32
  kCos,              // [*g, T, D] flat; float16, bfloat16, float32
  kSin,              // [*g, T, D] flat; dtype of cos
  kKCache,           // [*g, *r, Nkv, D]; int8
  kVCache,           // [*g, *r, Nkv, D]; int8
  kSlots,            // [*g, T]; int32
  kScaleK,           // [*g', Nkv, D]; float32
  kScaleV,           // [*g', Nkv, D]; float32
  kOffsetK,          // [*g', Nkv, D] or [0]; float32
  kOffsetV,          // [*g', Nkv, D] or [0]; float32
  kWeightScale,      // [*g', H] or [0]; float32
  kActivationScale,  // [*g, T] or [0]; float32
  kBias,             // [*g', H] or [0]; float32, float16, bfloat16, int32
  kNumArgs,
};

// Results in the order of the call, written as the operands are.
enum Ret : int {
  kQOut,       // [*g, T, Nq, D] flat; dtype of cos
  kKOut,       // [*g, T, Nkv, D] flat or [0]; dtype of cos; [0] unless kv_output
  kVOut,       // [*g, T, Nkv, D] flat or [0]; dtype of cos; [0] unless kv_output
  kKCacheOut,  // [*g, *r, Nkv, D]; int8; the memory of operand k_cache
  kVCacheOut,  // [*g, *r, Nkv, D]; int8; the memory of operand v_cache
  kNumRets,
};

inline constexpr const char* kArgNames[kNumArgs] = {
    "x",       "cos",      "sin",      "k_cache",      "v_cache",          "slots", "scale_k",
    "scale_v", "offset_k", "offset_v", "weight_scale", "activation_scale", "bias"};
inline constexpr const char* kRetNames[kNumRets] = {"q", "k", "v", "k_cache result",
                                                    "v_cache result"};

// One call as it arrives.
struct Call {
  Tensor args[kNumArgs];
  Tensor rets[kNumRets];
  bool kv_output = false;  // whether results k and v are wanted
};

// What a checked call amounts to. Every product of these sizes fits int64_t, and `rows` fits
// int32_t.
struct Shape {
  Groups groups;
  int64_t tokens = 0;        // T, per group
  int64_t rows = 0;          // C = prod(r), per group
  int64_t num_q_heads = 0;   // Nq
  int64_t num_kv_heads = 0;  // Nkv
  int64_t head_dim = 0;      // D, even
  DType x_dtype = DType::kF32;
  DType table_dtype = DType::kF32;  // of cos, sin, q, k and v
  DType bias_dtype = DType::kF32;
  bool kv_output = false;
  bool has_offset = false;
  bool has_activation_scale = false;
  bool has_bias = false;

  // For operands with dimensions *g': the mask that Groups::ParameterBlock reads.
  uint32_t group_mask[kNumArgs] = {};

  constexpr int64_t all_tokens() const { return groups.count * tokens; }          // G * T
  constexpr int64_t num_heads() const { return num_q_heads + 2 * num_kv_heads; }  // Nq + 2*Nkv
  constexpr int64_t fused_width() const { return num_heads() * head_dim; }        // H
  constexpr int64_t row_size() const { return num_kv_heads * head_dim; }  // Nkv * D, a cache row
  constexpr bool x_is_accumulator() const {
    return x_dtype == DType::kS32;
  }  // of an int8 matrix product

  // Which of its blocks ([Nkv, D] or [H]) operand `arg` gives to `group` in [0, G).
  constexpr int64_t ParameterBlock(Arg arg, int64_t group) const {
    return groups.ParameterBlock(group_mask[arg], group);
  }

  // Whether every parameter has one block for all groups: each dimension of each g' is 1.
  bool SharesParameters() const;
};

// Checks ranks, shapes, dtypes, presence, sizes and aliasing, and fills `shape`. It reads no
// element of any array: the kernels check the slots. Returns an empty string, or the error for the
// caller, which names the operator and the argument.
std::string Validate(const Call& call, Shape* shape);

}  // namespace jax_kvcache::dequant_rope_quant_kvcache

#endif  // JAX_KVCACHE_FFI_CORE_DEQUANT_ROPE_QUANT_KVCACHE_H_
