// Owns the choice of the attention kernel's variant for this processor, and the pointers that it
// gets.
#include "cpu/decode_attention_kernel.h"

#include "cpu/decode_attention_kernel_variant.h"

namespace jax_kvcache::decode_attention {

Buffers ToBuffers(const Call& call, const Shape& shape) {
  const auto floats = [&](Arg arg) { return static_cast<const float*>(call.args[arg].data); };
  Buffers b;
  b.q = call.args[kQ].data;
  b.k_cache = static_cast<const int8_t*>(call.args[kKCache].data);
  b.v_cache = static_cast<const int8_t*>(call.args[kVCache].data);
  b.table = static_cast<const int32_t*>(call.args[kTable].data);
  b.positions = static_cast<const int32_t*>(call.args[kPositions].data);
  b.scale_k = floats(kScaleK);
  b.scale_v = floats(kScaleV);
  if (shape.has_offset) {
    b.offset_k = floats(kOffsetK);
    b.offset_v = floats(kOffsetV);
  }
  if (shape.has_sinks) b.sinks = floats(kSinks);
  b.out = call.rets[kOut].data;
  if (shape.return_lse) b.lse = static_cast<float*>(call.rets[kLse].data);
  return b;
}

const Kernel& SelectKernel([[maybe_unused]] Simd simd) {
#if defined(__x86_64__)
  // Every processor with AVX2 that we know of has FMA, but they are two features.
  if (simd >= Simd::kAvx512) return SelectAvx512();
  if (simd == Simd::kAvx2 && __builtin_cpu_supports("fma")) return SelectAvx2();
#endif
  return SelectBaseline();
}

}  // namespace jax_kvcache::decode_attention
