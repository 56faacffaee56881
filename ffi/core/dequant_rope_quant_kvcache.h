// Owns the canonical form of one call: its operands, its shape, and the checks that every backend
// runs first.
#ifndef JAX_KVCACHE_FFI_CANONICAL_H_
#define JAX_KVCACHE_FFI_CANONICAL_H_

#include <cstdint>
#include <string>

namespace jax_kvcache {

// The FFI target's name on every platform, and the first word of every error.
inline constexpr char kOperator[] = "dequant_rope_quant_kvcache";

// Operands in the order of the call. Shapes are row-major and dense; g: group dimensions, possibly
// none, G groups in all; g': as g with each dimension 1 (shared) or full; r: row dimensions, at
// least one. The tables and the results are flat because XLA would copy some of them otherwise.
enum Arg : int {
  kX,                // [*g, T, H] int32, float16, bfloat16, float32; H = (Nq + 2*Nkv) * D
  kCos,              // [G * T * D] float16, bfloat16, float32
  kSin,              // [G * T * D] as cos
  kKCache,           // [*g, *r, Nkv, D] int8
  kVCache,           // as k_cache
  kSlots,            // [*g, T] int32
  kScaleK,           // [*g', Nkv, D] float32
  kScaleV,           // [*g', Nkv, D] float32
  kOffsetK,          // [*g', Nkv, D] float32, or [0]
  kOffsetV,          // [*g', Nkv, D] float32, or [0]
  kWeightScale,      // [*g', H] float32, or [0]
  kActivationScale,  // [*g, T] float32, or [0]
  kBias,             // [*g', H] float32, float16, bfloat16, int32, or [0]
  kNumArgs,
};

// Results in the order of the call.
enum Ret : int {
  kQOut,       // [G * T * Nq * D], dtype of cos
  kKOut,       // [G * T * Nkv * D], dtype of cos, or [0] when kv_output is false
  kVOut,       // as k
  kKCacheOut,  // the buffer of operand k_cache
  kVCacheOut,  // the buffer of operand v_cache
  kNumRets,
};

inline constexpr const char* kArgNames[kNumArgs] = {
    "x",       "cos",      "sin",      "k_cache",      "v_cache",          "slots", "scale_k",
    "scale_v", "offset_k", "offset_v", "weight_scale", "activation_scale", "bias"};
inline constexpr const char* kRetNames[kNumRets] = {"q", "k", "v", "k_cache result",
                                                    "v_cache result"};

// Element types, numbered as XLA numbers them so that reading one is a cast. Any other number is a
// type that no operand may have.
enum class DType : uint8_t { kS8 = 2, kS32 = 4, kF16 = 10, kF32 = 11, kBF16 = 16 };

// Bytes of one element.
int64_t ItemSize(DType dtype);

// A dense row-major array that somebody else owns.
struct Tensor {
  void* data = nullptr;
  const int64_t* dims = nullptr;
  int64_t rank = 0;
  DType dtype = DType::kF32;
};

struct Call {
  Tensor args[kNumArgs];
  Tensor rets[kNumRets];
  bool kv_output = false;
};

// Group dimensions come from the caller and from vmap; this is more than any nesting of them needs.
inline constexpr int kMaxGroupRank = 16;

// What a checked call amounts to. Every product here fits int64_t, and rows fits int32_t.
struct Shape {
  int group_rank = 0;
  int64_t group_dims[kMaxGroupRank] = {};
  int64_t groups = 0;     // G = prod(g)
  int64_t tokens = 0;     // T, per group
  int64_t rows = 0;       // C = prod(r), per group
  int64_t num_q = 0;      // Nq
  int64_t num_kv = 0;     // Nkv
  int64_t head_dim = 0;   // D, even
  DType x = DType::kF32;  // dtype of x
  DType table = DType::kF32;
  DType bias = DType::kF32;
  bool kv_output = false;
  bool has_offset = false;
  bool has_activation_scale = false;
  bool has_bias = false;

  // Bit i is set where dimension i of the parameter's g' is full. Only the operands with a g' use
  // it.
  uint32_t group_mask[kNumArgs] = {};

  int64_t hidden() const { return (num_q + 2 * num_kv) * head_dim; }  // H

  // Which of its blocks ([Nkv, D] or [H]) parameter `arg` gives to group `group` in [0, G).
  int64_t ParameterBlock(Arg arg, int64_t group) const;

  // True if every parameter has one block for all groups (each dimension of each g' is 1).
  bool SharesParameters() const;
};

// Checks ranks, shapes, dtypes, presence, sizes and aliasing, and fills `shape`. Reads no element
// of any array: slots are the kernels' to check. Returns the error for the caller, naming the
// operator and the argument, or an empty string.
std::string Validate(const Call& call, Shape* shape);

// "float16", or "dtype 12" for a number without a name here.
std::string DTypeName(DType dtype);

// "[2, 8, 128]".
std::string DimsText(const int64_t* dims, int64_t rank);

}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_CANONICAL_H_
