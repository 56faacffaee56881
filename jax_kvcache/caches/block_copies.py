"""Copies whole blocks of a paged cache's codes, one pair of block numbers after the other."""

import jax
import jax.numpy as jnp

from jax_kvcache.ops.explicit import automatically, spec_of
from jax_kvcache.ops.indexing import take_one
from jax_kvcache.ops.slots import is_row


# Jitted here, so that calls outside of `jax.jit` compile once for all caches of a shape.
@jax.jit
def copy_pairs(
    k_cache: jax.Array, v_cache: jax.Array, sources: jax.Array, destinations: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Both caches after the copies; see `PagedKVCache.copy_blocks`."""
    specs = (spec_of(k_cache), spec_of(v_cache))
    return automatically(_copy_pairs, specs, k_cache, v_cache, sources, destinations)


def _copy_pairs(
    k_cache: jax.Array, v_cache: jax.Array, sources: jax.Array, destinations: jax.Array
) -> tuple[jax.Array, jax.Array]:
    blocks = k_cache.shape[-4]
    copied = is_row(sources, blocks) & is_row(destinations, blocks)
    destinations = jnp.where(copied, destinations, blocks)  # past the end, which is dropped
    return _copy_all(k_cache, v_cache, sources, destinations)


def _copy_all(
    k_cache: jax.Array, v_cache: jax.Array, sources: jax.Array, destinations: jax.Array
) -> tuple[jax.Array, jax.Array]:
    layers = (slice(None),) * (k_cache.ndim - 4)

    def copy_one(i: jax.Array, caches: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        source, destination = take_one(sources, i), take_one(destinations, i)
        k_cache, v_cache = (
            cache.at[*layers, destination].set(
                take_one(cache, source, axis=len(layers)), mode="drop"
            )
            for cache in caches
        )
        return k_cache, v_cache

    return jax.lax.fori_loop(0, sources.shape[0], copy_one, (k_cache, v_cache))
