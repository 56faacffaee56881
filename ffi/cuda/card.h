// Owns what the host asks about the card that a call runs on.
#ifndef JAX_KVCACHE_FFI_CUDA_CARD_H_
#define JAX_KVCACHE_FFI_CUDA_CARD_H_

namespace jax_kvcache::cuda {

// The multiprocessors of the card whose context is current on this thread, or 0 if CUDA does not
// say.
int CountMultiprocessors();

}  // namespace jax_kvcache::cuda

#endif  // JAX_KVCACHE_FFI_CUDA_CARD_H_
