"""How many of a cache's codes lie at an end of their range, where values beyond it are cut off."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_kvcache.export import register_namedtuple_serialization


@register_namedtuple_serialization
class Saturation(NamedTuple):
    """Shares of codes, float32 scalars, or [L] for a cache with layers.

    Attributes:
      k: of the codes of K.
      v: of the codes of V.
    """

    k: jax.Array
    v: jax.Array


def shares_at_ends(k_cache: jax.Array, v_cache: jax.Array, in_use: jax.Array) -> Saturation:
    """The shares of the codes -128 and 127 in the rows that are in use; 0 where none is.

    Args:
      k_cache: [C1, C2, Nkv, D] int8, or [L, C1, C2, Nkv, D].
      v_cache: as k_cache.
      in_use: [C1, C2] bool.
    """
    rows = in_use.sum(dtype=jnp.int32).astype(jnp.float32)
    codes = jnp.maximum(rows * math.prod(k_cache.shape[-2:]), 1.0)

    def share(cache: jax.Array) -> jax.Array:
        at_end = (cache == -128) | (cache == 127)
        per_row = at_end.sum(axis=(-2, -1), dtype=jnp.int32)  # [*L, C1, C2]
        counted = per_row * jnp.broadcast_to(in_use.astype(jnp.int32), per_row.shape)
        return counted.astype(jnp.float32).sum(axis=(-2, -1)) / codes

    return Saturation(share(k_cache), share(v_cache))
