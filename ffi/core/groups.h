// Owns the group dimensions of a call, and which block of a parameter each group uses.
#ifndef JAX_KVCACHE_FFI_CORE_GROUPS_H_
#define JAX_KVCACHE_FFI_CORE_GROUPS_H_

#include <cstdint>

namespace jax_kvcache {

// The caller and vmap add group dimensions; no sensible nesting of them has more.
inline constexpr int kMaxGroupRank = 16;

// The group dimensions g of a call, possibly none. The G groups are numbered in row-major order.
// The member functions of this and of the operators' Shape are constexpr so that CUDA kernels, too,
// may call them.
struct Groups {
  int rank = 0;
  int64_t dims[kMaxGroupRank] = {};
  int64_t count = 0;  // G = prod(g)

  // A parameter with group dimensions g' (each 1, which all groups share, or as in g) has prod(g')
  // blocks. Returns which of them belongs to `group` in [0, G). Bit i of `mask` is set where
  // dimension i of g' is that of g and not 1.
  constexpr int64_t ParameterBlock(uint32_t mask, int64_t group) const {
    int64_t block = 0;
    int64_t stride = 1;
    for (int i = rank - 1; mask != 0 && i >= 0; --i) {
      if ((mask >> i) & 1U) {
        block += group % dims[i] * stride;
        stride *= dims[i];
      }
      group /= dims[i];
    }
    return block;
  }
};

}  // namespace jax_kvcache

#endif  // JAX_KVCACHE_FFI_CORE_GROUPS_H_
