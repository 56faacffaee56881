// Owns the choice of an instruction set, which all CPU kernels share.
#ifndef JAX_KVCACHE_FFI_CPU_SIMD_LEVEL_H_
#define JAX_KVCACHE_FFI_CPU_SIMD_LEVEL_H_

namespace jax_kvcache {

// The instruction sets that the kernels are compiled for, from the least to the best. Other
// processors than x86-64 have the baseline only. The write has the same results in all, bit for
// bit; attention does not.
enum class Simd : int { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kCount };

// "baseline", "avx2", "avx512" or "avx512_bf16".
const char* SimdName(Simd simd);

// Whether the library was built for this instruction set and this machine has it.
bool SimdSupported(Simd simd);

// The instruction set in use: the best that is supported, unless UseSimd chose another.
Simd ActiveSimd();

// For tests: chooses by name. Returns false, and changes nothing, if it is not supported here.
bool UseSimd(const char* name);

}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_CPU_SIMD_LEVEL_H_
