// Owns the native call of decode_attention: its operands and results, its shape, and the checks
// that every platform makes first.
#ifndef JAX_KVCACHE_FFI_CORE_DECODE_ATTENTION_H_
#define JAX_KVCACHE_FFI_CORE_DECODE_ATTENTION_H_

#include <cstdint>
#include <string>

#include "core/groups.h"
#include "core/tensor.h"

namespace jax_kvcache::decode_attention {

// The FFI target's name on every platform, and the first word of every error.
inline constexpr char kOperator[] = "decode_attention";

// Operands in the order of the call, each with "dimensions; element types". Arrays are row-major
// and dense. *g: group dimensions, possibly none, G groups in all; *g': as many dimensions, each 1
// (shared by all groups) or that of g; *n: block dimensions, at least one, NB blocks per group in
// all; B sequences of S queries; R rows per block; M blocks per sequence. "or [0]": optional.
enum Arg : int {
  kQ,          // [*g, B, S, Nq, D]; float16, bfloat16, float32
  kKCache,     // [*g', *n, R, Nkv, D]; int8
  kVCache,     // [*g', *n, R, Nkv, D]; int8
  kTable,      // [*g, B, M]; int32; a block outside [0, NB) does not exist: its rows are not seen
  kPositions,  // [*g, B, S]; int32; the last row that the query sees; negative: it sees none
  kScaleK,     // [*g', Nkv, D]; float32
  kScaleV,     // [*g', Nkv, D]; float32
  kOffsetK,    // [*g', Nkv, D] or [0]; float32
  kOffsetV,    // [*g', Nkv, D] or [0]; float32
  kSinks,      // [*g', Nq] or [0]; float32
  kNumArgs,
};

// Results in the order of the call, written as the operands are.
enum Ret : int {
  kOut,  // [*g, B, S, Nq, D]; dtype of q
  kLse,  // [*g, B, S, Nq] or [0]; float32; [0] unless return_lse
  kNumRets,
};

inline constexpr const char* kArgNames[kNumArgs] = {"q",         "k_cache", "v_cache", "table",
                                                    "positions", "scale_k", "scale_v", "offset_k",
                                                    "offset_v",  "sinks"};
inline constexpr const char* kRetNames[kNumRets] = {"out", "lse"};

// One call as it arrives.
struct Call {
  Tensor args[kNumArgs];
  Tensor rets[kNumRets];
  float scale = 1.0f;       // factor of the scores
  int64_t window = 0;       // a query sees only the last `window` rows up to its position; 0: all
  float soft_cap = 0.0f;    // scores become soft_cap * tanh(score / soft_cap); 0: they stay
  bool return_lse = false;  // whether result lse is wanted
};

// What a checked call amounts to. Every product of sizes that an array has fits int64_t.
struct Shape {
  Groups groups;
  int64_t sequences = 0;     // B, per group
  int64_t queries = 0;       // S, per sequence
  int64_t num_q_heads = 0;   // Nq, a multiple of Nkv
  int64_t num_kv_heads = 0;  // Nkv
  int64_t head_dim = 0;      // D
  int64_t blocks = 0;        // NB = prod(n), per group
  int64_t block_rows = 0;    // R
  int64_t table_blocks = 0;  // M
  DType q_dtype = DType::kF32;
  bool has_offset = false;
  bool has_sinks = false;
  float scale = 1.0f;
  int64_t window = 0;
  float soft_cap = 0.0f;
  bool return_lse = false;

  // For operands with dimensions *g': the mask that Groups::ParameterBlock reads.
  uint32_t group_mask[kNumArgs] = {};

  int64_t queries_per_kv_head() const { return num_q_heads / num_kv_heads; }  // Nq / Nkv
  int64_t row_size() const { return num_kv_heads * head_dim; }  // Nkv * D, one row of a cache

  // Which of its blocks (prod(n) * R rows, [Nkv, D] or [Nq]) operand `arg` gives to `group`.
  int64_t ParameterBlock(Arg arg, int64_t group) const {
    return groups.ParameterBlock(group_mask[arg], group);
  }
};

// Checks ranks, shapes, dtypes, presence, sizes and attributes, and fills `shape`. It reads no
// element of any array: the kernels check the table and the positions. Returns an empty string, or
// the error for the caller, which names the operator and the argument.
std::string Validate(const Call& call, Shape* shape);

}  // namespace jax_kvcache::decode_attention

#endif  // JAX_KVCACHE_FFI_CORE_DECODE_ATTENTION_H_
