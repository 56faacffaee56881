// Owns which lane of a warp has which columns and rows of the matrices that decode_attention
// multiplies.
#ifndef JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_GEOMETRY_H_
#define JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_GEOMETRY_H_

#include "cuda/device.h"

namespace jax_kvcache::decode_attention::cuda {

// The D columns of a row may take part in a product in any order, if both factors have the same
// one. So each lane reads its part of a row of codes with the widest accesses that D allows, and
// the order is the one that follows. With g = lane / 4 and c = lane % 4:
//
// Scores: lane (g, c) reads of cache row g of every eight the granules c, c + 4, ... of kKeyBytes
// columns. Each word of four columns is the lane's part of one product over 16 columns, a "step".
//
// Sums: lane (g, c) reads of cache rows 2c, 2c + 1, 2c + 8 and 2c + 9 of every sixteen the granules
// g, g + 8, ... of kValueBytes columns. Each column is the lane's part of one product with eight
// columns, a "column tile"; where D is not a multiple of the granules of eight lanes, the last ones
// have none.
template <int D>
struct Geometry {
  static_assert(D % 16 == 0);
  static constexpr int kSteps = D / 16;
  static constexpr int kKeyBytes = D % 64 == 0 ? 16 : D % 32 == 0 ? 8 : 4;
  static constexpr int kKeyLoads = D / 4 / kKeyBytes;
  static constexpr int kValueBytes = D % 128 == 0 ? 16 : D % 64 == 0 ? 8 : 4;
  static constexpr int kValueLoads = (D + 8 * kValueBytes - 1) / (8 * kValueBytes);
  static constexpr int kColumnTiles = kValueLoads * kValueBytes;
  // Cache rows that a warp processes at a time. More rows mean more reads in flight; with many
  // columns there are not enough registers for them.
  static constexpr int kRows = D > 128 ? 16 : 32;

  // The column of q and K that element `e` in [0, 4) of lane `c`'s word in a step stands for.
  static constexpr int KeyColumn(int c, int step, int e) {
    return (c + 4 * (4 * step / kKeyBytes)) * kKeyBytes + 4 * step % kKeyBytes + e;
  }
  // The column of V that lane `g` has in a column tile; D or more if it has none.
  static constexpr int ValueColumn(int g, int tile) {
    return (g + 8 * (tile / kValueBytes)) * kValueBytes + tile % kValueBytes;
  }
};

}  // namespace jax_kvcache::decode_attention::cuda

#endif  // JAX_KVCACHE_FFI_CUDA_DECODE_ATTENTION_GEOMETRY_H_
