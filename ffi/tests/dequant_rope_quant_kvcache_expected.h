// Owns the expected results of a call of dequant_rope_quant_kvcache: those of the scalar rendering,
// group by group.
#ifndef JAX_KVCACHE_FFI_TESTS_DEQUANT_ROPE_QUANT_KVCACHE_EXPECTED_H_
#define JAX_KVCACHE_FFI_TESTS_DEQUANT_ROPE_QUANT_KVCACHE_EXPECTED_H_

#include <cstdint>
#include <vector>

#include "core/dequant_rope_quant_kvcache.h"
#include "standin/dequant_rope_quant_kvcache.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {

// `t` from its `offset`th element on, or null if the array is left out.
inline standin::Array ArrayFrom(const Tensor& t, int64_t offset) {
  standin::Array array;
  if (t.data == nullptr) return array;
  array.data = static_cast<char*>(t.data) + offset * ItemSize(t.dtype);
  if (t.dtype == DType::kS32) array.type = standin::Type::kInt32;
  if (t.dtype == DType::kF16) array.type = standin::Type::kFloat16;
  if (t.dtype == DType::kBF16) array.type = standin::Type::kBfloat16;
  return array;
}

// Which block of a parameter belongs to `group`, found from all its dimensions g'.
inline int64_t BlockOf(const Tensor& parameter, const Groups& groups, int64_t group) {
  int64_t index[kMaxGroupRank] = {};
  for (int i = groups.rank - 1; i >= 0; --i) {
    index[i] = group % groups.dims[i];
    group /= groups.dims[i];
  }
  int64_t block = 0;
  for (int i = 0; i < groups.rank; ++i) {
    block = block * parameter.dims[i] + (parameter.dims[i] == 1 ? 0 : index[i]);
  }
  return block;
}

inline standin::ScalarCall ScalarCallOf(const Call& call, const Shape& shape, int64_t group) {
  const int64_t tokens = shape.tokens;
  const int64_t fused_width = shape.fused_width();
  const int64_t row_size = shape.row_size();
  const auto per_token = [&](const Tensor& t, int64_t columns) {
    return ArrayFrom(t, group * tokens * columns);
  };
  const auto parameter = [&](Arg arg, int64_t size) {
    const Tensor& t = call.args[arg];
    return IsAbsent(t) ? standin::Array{} : ArrayFrom(t, BlockOf(t, shape.groups, group) * size);
  };
  const auto cache = [&](Arg arg) {
    return static_cast<int8_t*>(ArrayFrom(call.args[arg], group * shape.rows * row_size).data);
  };
  standin::ScalarCall c;
  c.tokens = tokens;
  c.rows = shape.rows;
  c.num_q_heads = shape.num_q_heads;
  c.num_kv_heads = shape.num_kv_heads;
  c.head_dim = shape.head_dim;
  c.x = per_token(call.args[kX], fused_width);
  c.cos = per_token(call.args[kCos], shape.head_dim);
  c.sin = per_token(call.args[kSin], shape.head_dim);
  c.k_cache = cache(kKCache);
  c.v_cache = cache(kVCache);
  c.slots = static_cast<const int32_t*>(per_token(call.args[kSlots], 1).data);
  c.scale_k = parameter(kScaleK, row_size);
  c.scale_v = parameter(kScaleV, row_size);
  c.offset_k = parameter(kOffsetK, row_size);
  c.offset_v = parameter(kOffsetV, row_size);
  c.weight_scale = parameter(kWeightScale, fused_width);
  c.activation_scale = per_token(call.args[kActivationScale], 1);
  c.bias = parameter(kBias, fused_width);
  c.q = per_token(call.rets[kQOut], shape.num_q_heads * shape.head_dim);
  c.k = per_token(call.rets[kKOut], row_size);
  c.v = per_token(call.rets[kVOut], row_size);
  return c;
}

// Fills the call's results.
inline void ComputeExpected(const Call& call, const Shape& shape) {
  std::vector<float> row(static_cast<size_t>(shape.fused_width()));
  for (int64_t group = 0; group < shape.groups.count; ++group) {
    standin::Execute(ScalarCallOf(call, shape, group), row.data());
  }
}

}  // namespace jax_kvcache::dequant_rope_quant_kvcache

#endif  // JAX_KVCACHE_FFI_TESTS_DEQUANT_ROPE_QUANT_KVCACHE_EXPECTED_H_
