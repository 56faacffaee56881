"""How many of a cache's codes lie at an end of their range, where values beyond it are cut off."""

import functools
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jax_kvcache.export import register_namedtuple_serialization
from jax_kvcache.ops.explicit import automatically, spec_of

_NEIGHBOURS = 8  # of more, XLA:CPU writes the comparisons to memory before it adds them up


@register_namedtuple_serialization
class Saturation(NamedTuple):
    """Shares of codes, float32 scalars, or [L] for a cache with layers.

    Attributes:
      k: of the codes of K.
      v: of the codes of V.
    """

    k: jax.Array
    v: jax.Array


# Jitted here, so that a call outside of `jax.jit` makes no arrays of the caches' size either.
@jax.jit
def shares_at_ends(k_cache: jax.Array, v_cache: jax.Array, in_use: jax.Array) -> Saturation:
    """The shares of the codes -128 and 127 in the rows that are in use; 0 where none is.

    Args:
      k_cache: [C1, C2, Nkv, D] int8, or [L, C1, C2, Nkv, D].
      v_cache: as k_cache.
      in_use: [C1, C2] bool.
    """
    specs = tuple(PartitionSpec(*spec_of(cache)[:-4]) for cache in (k_cache, v_cache))
    return Saturation(*automatically(_shares, specs, k_cache, v_cache, in_use))


def _shares(k_cache: jax.Array, v_cache: jax.Array, in_use: jax.Array) -> tuple[jax.Array, ...]:
    rows = in_use.sum(dtype=jnp.int32).astype(jnp.float32)
    codes = jnp.maximum(rows * math.prod(k_cache.shape[-2:]), 1.0)

    def share(cache: jax.Array) -> jax.Array:
        per_row = _at_ends(cache)
        counted = per_row * jnp.broadcast_to(in_use.astype(jnp.int32), per_row.shape)
        return counted.astype(jnp.float32).sum(axis=(-2, -1)) / codes

    return share(k_cache), share(v_cache)


def _at_ends(cache: jax.Array) -> jax.Array:
    """[*L, C1, C2] int32: how many codes of each row lie at an end.

    Neighbours in D are added up first, in int8. XLA:CPU does this while it reduces the sums; a
    reduction of the comparisons themselves would make an int32 array of the cache's shape.
    """
    at_end = ((cache == -128) | (cache == 127)).astype(jnp.int8)
    count = math.gcd(_NEIGHBOURS, cache.shape[-1])
    neighbours = at_end.reshape(*cache.shape[:-1], -1, count)
    sums = functools.reduce(operator.add, (neighbours[..., i] for i in range(count)))
    return sums.sum(axis=(-2, -1), dtype=jnp.int32)
