// Owns the interface of the CPU kernel: pointers and a checked shape, nothing of XLA.
#ifndef JAX_KVCACHE_FFI_KERNEL_H_
#define JAX_KVCACHE_FFI_KERNEL_H_

#include <cstdint>

#include "canonical.h"

namespace jax_kvcache {

// The arrays of one checked call; shapes and dtypes as in canonical.h, absent ones null.
struct Buffers {
  const void* x;                  // [*g, T, H]
  const void* cos;                // [*g, T, D]
  const void* sin;                // [*g, T, D]
  int8_t* k_cache;                // [*g, C, Nkv, D]
  int8_t* v_cache;                // [*g, C, Nkv, D]
  const int32_t* slots;           // [*g, T]
  const float* scale_k;           // [*g', Nkv, D]
  const float* scale_v;           // [*g', Nkv, D]
  const float* offset_k;          // [*g', Nkv, D]
  const float* offset_v;          // [*g', Nkv, D]
  const float* weight_scale;      // [*g', H]
  const float* activation_scale;  // [*g, T]
  const void* bias;               // [*g', H]
  void* q;                        // [*g, T, Nq, D]
  void* k;                        // [*g, T, Nkv, D]
  void* v;                        // [*g, T, Nkv, D]
};

Buffers ToBuffers(const Call& call, const Shape& shape);

// A part of a call: tokens of the flat [G * T], and heads of a token's row in x, of which it has
// Nq of q, then Nkv of k, then Nkv of v.
struct Part {
  int64_t token_begin;
  int64_t token_end;
  int64_t head_begin;
  int64_t head_end;
};

// The kernel does that many tokens at a time, and single ones slower.
inline constexpr int kTokensTogether = 4;

// Does one part, on the calling thread, tokens in order. Parts of one call may run at the same time
// as long as no two of them write the same bytes. Exact in any rounding-to-nearest environment;
// float32 subnormals follow the thread's flush mode.
using Kernel = void (*)(const Shape& shape, const Buffers& buffers, const Part& part);

// The instruction sets that the kernel is built for. The results are the same bits.
enum class Simd : int { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kCount };

const char* SimdName(Simd simd);

// Whether this build has the variant and this machine can run it.
bool SimdSupported(Simd simd);

// The variant in use: the best supported one, unless a test asked for another by name. UseSimd
// returns false, and changes nothing, if there is no such variant here.
Simd ActiveSimd();
bool UseSimd(const char* name);

// The kernel for the shape's dtypes.
Kernel SelectKernel(Simd simd, const Shape& shape);

}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_KERNEL_H_
