// Owns the step from a checked call of dequant_rope_quant_kvcache to its pointers.
#include "core/dequant_rope_quant_kvcache_buffers.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {

Buffers ToBuffers(const Call& call, const Shape& shape) {
  const auto floats = [&](Arg arg) { return static_cast<const float*>(call.args[arg].data); };
  Buffers b;
  b.x = call.args[kX].data;
  b.cos = call.args[kCos].data;
  b.sin = call.args[kSin].data;
  b.k_cache = static_cast<int8_t*>(call.args[kKCache].data);
  b.v_cache = static_cast<int8_t*>(call.args[kVCache].data);
  b.slots = static_cast<const int32_t*>(call.args[kSlots].data);
  b.scale_k = floats(kScaleK);
  b.scale_v = floats(kScaleV);
  if (shape.has_offset) {
    b.offset_k = floats(kOffsetK);
    b.offset_v = floats(kOffsetV);
  }
  if (shape.x_is_accumulator()) b.weight_scale = floats(kWeightScale);
  if (shape.has_activation_scale) b.activation_scale = floats(kActivationScale);
  if (shape.has_bias) b.bias = call.args[kBias].data;
  b.q = call.rets[kQOut].data;
  if (shape.kv_output) {
    b.k = call.rets[kKOut].data;
    b.v = call.rets[kVOut].data;
  }
  return b;
}

}  // namespace jax_kvcache::dequant_rope_quant_kvcache
