// Owns what lets the kernels' headers compile twice: by nvcc for a GPU, and by a C++ compiler for
// the tests, which run them on the host.
#ifndef JAX_KVCACHE_FFI_CUDA_DEVICE_H_
#define JAX_KVCACHE_FFI_CUDA_DEVICE_H_

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define JAX_KVCACHE_DEVICE __device__ __forceinline__
// Before a loop whose steps must all be written out, because they index registers.
#define JAX_KVCACHE_UNROLL _Pragma("unroll")
#else
#define JAX_KVCACHE_DEVICE inline
#define JAX_KVCACHE_UNROLL
#endif

namespace jax_kvcache::cuda {

// N elements that are read or written in one access, or in several of 16 bytes. They lie at an
// address that is a multiple of the access's size.
template <typename T, int N>
struct alignas(sizeof(T) * N <= 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};

template <int N, typename T>
JAX_KVCACHE_DEVICE Pack<T, N> LoadPack(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <int N, typename T>
JAX_KVCACHE_DEVICE void StorePack(const Pack<T, N>& pack, T* to) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// `pointer + count`, or null for an optional array that is left out.
template <typename T>
JAX_KVCACHE_DEVICE T* Advance(T* pointer, int64_t count) {
  return pointer == nullptr ? nullptr : pointer + count;
}

template <typename To, typename From>
JAX_KVCACHE_DEVICE To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// The smallest integer that is not less than a / b.
template <typename T>
constexpr T CeilDivide(T a, T b) {
  return a / b + (a % b != 0 ? 1 : 0);
}

}  // namespace jax_kvcache::cuda

#endif  // JAX_KVCACHE_FFI_CUDA_DEVICE_H_
