"""Copies whole blocks of a paged cache's codes, one pair of block numbers after the other."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jax_kvcache.ops.explicit import automatically, spec_of
from jax_kvcache.ops.indexing import take_one
from jax_kvcache.ops.slots import is_row

Caches = tuple[jax.Array, jax.Array]


# Jitted here, so that calls outside of `jax.jit` compile once for all caches of a shape.
@jax.jit
def copy_pairs(
    k_cache: jax.Array, v_cache: jax.Array, sources: jax.Array, destinations: jax.Array
) -> Caches:
    """Both caches after the copies; see `PagedKVCache.copy_blocks`."""
    specs = (spec_of(k_cache), spec_of(v_cache))
    return automatically(_copy_pairs, specs, k_cache, v_cache, sources, destinations)


def _copy_pairs(
    k_cache: jax.Array, v_cache: jax.Array, sources: jax.Array, destinations: jax.Array
) -> Caches:
    """Copies the pairs that name two blocks, in their order; a loop passes over these alone."""
    blocks = k_cache.shape[-4]
    copied = is_row(sources, blocks) & is_row(destinations, blocks)
    order = jnp.argsort(~copied, stable=True)
    sources = sources[order]
    destinations = jnp.where(copied, destinations, blocks)[order]  # past the end: dropped
    count = copied.sum(dtype=jnp.int32)
    return _with_one_count(_copy_first)(k_cache, v_cache, sources, destinations, count)


def _copy_first(
    k_cache: jax.Array,
    v_cache: jax.Array,
    sources: jax.Array,
    destinations: jax.Array,
    count: jax.Array,
) -> Caches:
    """Copies the first `count` pairs, one after the other."""
    layers = (slice(None),) * (k_cache.ndim - 4)

    def copy_one(i: jax.Array, caches: Caches) -> Caches:
        source, destination = take_one(sources, i), take_one(destinations, i)
        k_cache, v_cache = (
            cache.at[*layers, destination].set(
                take_one(cache, source, axis=len(layers)), mode="drop"
            )
            for cache in caches
        )
        return k_cache, v_cache

    return jax.lax.fori_loop(0, count, copy_one, (k_cache, v_cache))


def _with_one_count(copy: Callable[..., Caches]) -> Callable[..., Caches]:
    """`copy`, whose last argument is the count, with one count for all examples under `vmap`.

    With a count for each example XLA would select between whole caches after every pair, to keep
    those of the examples that are done. Under the largest count they drop pairs instead.
    """
    counted = custom_vmap(copy)

    @counted.def_vmap
    def batched(
        axis_size: int, in_batched: list[bool], *arguments: jax.Array
    ) -> tuple[Caches, tuple[bool, bool]]:
        *arrays, count = arguments
        in_axes = [0 if mapped else None for mapped in in_batched[:-1]]
        examples = jax.vmap(copy, in_axes=(*in_axes, None), axis_size=axis_size)
        largest = count.max() if in_batched[-1] else count
        return _with_one_count(examples)(*arrays, largest), (True, True)

    return counted
