// Owns the choice of the kernel's variant, and the pointers that it gets.
#include "cpu/dequant_rope_quant_kvcache_kernel.h"

#include "cpu/dequant_rope_quant_kvcache_kernel_variant.h"

namespace jax_kvcache::dequant_rope_quant_kvcache {

Kernel SelectKernel([[maybe_unused]] Simd simd, const Shape& shape) {
#if defined(__x86_64__)
  // This instruction set has an instruction more than AVX-512, which rounds to bfloat16.
  if (simd == Simd::kAvx512Bf16 && shape.table_dtype != DType::kBF16) simd = Simd::kAvx512;
  // A variant needs one vector or more in each half of a head: 16 columns with AVX-512, 8 with
  // AVX2.
  const int64_t half_dim = shape.head_dim / 2;
  if (simd >= Simd::kAvx512 && half_dim < 16) simd = Simd::kAvx2;
  if (simd == Simd::kAvx2 && half_dim < 8) simd = Simd::kBaseline;
  if (simd == Simd::kAvx512Bf16) return SelectAvx512Bf16(shape);
  if (simd == Simd::kAvx512) return SelectAvx512(shape);
  if (simd == Simd::kAvx2) return SelectAvx2(shape);
#endif
  return SelectBaseline(shape);
}

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
