// Owns the step from a group's number to its block of a parameter.
#include "core/groups.h"

namespace jax_kvcache {

int64_t Groups::ParameterBlock(uint32_t mask, int64_t group) const {
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

}  // namespace jax_kvcache
