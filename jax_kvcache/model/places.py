"""Where a forward pass reads: its tokens, their positions and the cache's rows, all checked."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_kvcache.caches import KVCache, PagedKVCache
from jax_kvcache.caches.checks import check_caches
from jax_kvcache.model.float_cache import FloatCache
from jax_kvcache.model.weights import Config
from jax_kvcache.ops.checks import check_int, check_int32, check_shape, fitting_int32


class Places(NamedTuple):
    """The checked arguments of `forward`.

    Attributes:
      tokens: [B, S] int32.
      positions: [B] int32, or [B, S] for a `PagedKVCache`: what its `update` takes.
      of_tokens: [B, S] int32, the position of each token; negative for padding.
      block_table: [B, M] int32 for a `PagedKVCache`, else None.
      rows: the longest text that RoPE is made for.
    """

    tokens: jax.Array
    positions: jax.Array
    of_tokens: jax.Array
    block_table: jax.Array | None
    rows: int


def places(
    config: Config,
    tokens: ArrayLike,
    cache: KVCache | PagedKVCache | FloatCache,
    positions: ArrayLike,
    block_table: ArrayLike | None,
    rows: int | None,
) -> Places:
    """Checks the arguments of `forward`, and returns them as arrays."""
    rows = None if rows is None else check_int("rows", rows, 1)
    tokens = check_tokens(tokens)
    batch, steps = tokens.shape
    _check_cache(config, cache, batch)
    if isinstance(cache, PagedKVCache):
        if block_table is None:
            raise TypeError("`block_table` is required for a PagedKVCache, got None.")
        block_table = check_int32("block_table", block_table, "B, M", (batch, None))
        positions = check_int32("positions", positions, "B, S", (batch, steps))
        rows = rows or block_table.shape[1] * cache.k_cache.shape[2]
        return Places(tokens, positions, positions, block_table, rows)
    if block_table is not None:
        kind = type(cache).__name__
        raise TypeError(f"`block_table` must be None for a {kind}: only a PagedKVCache has one.")
    positions = check_int32("positions", positions, "B", (batch,))
    of_tokens = positions_of_tokens(positions, steps)
    return Places(tokens, positions, of_tokens, None, rows or cache_rows(cache))


def check_tokens(tokens: ArrayLike) -> jax.Array:
    """[B, S] int32. A NumPy array may have another integer dtype, as tokenizers make them."""
    if isinstance(tokens, np.ndarray):
        tokens = fitting_int32("tokens", tokens)
    return check_int32("tokens", tokens, "B, S")


def cache_rows(cache: KVCache | FloatCache) -> int:
    """How many rows each text has in a cache with layers."""
    return (cache.k if isinstance(cache, FloatCache) else cache.k_cache).shape[2]


def positions_of_tokens(starts: jax.Array, steps: int) -> jax.Array:
    """[B, S]: the positions of S tokens from each of `starts` on; -1 where that is negative."""
    of_tokens = starts[:, None] + jnp.arange(steps, dtype=jnp.int32)[None, :]
    return jnp.where(starts[:, None] < 0, -1, of_tokens)


def _check_cache(config: Config, cache: KVCache | PagedKVCache | FloatCache, batch: int) -> None:
    """Raises unless it is a cache of the model's layers and heads."""
    if not isinstance(cache, KVCache | PagedKVCache | FloatCache):
        raise TypeError(
            "`cache` must be a KVCache, a PagedKVCache or a FloatCache, got "
            f"{type(cache).__name__}."
        )
    wanted = (config.n_layers, config.n_kv_heads, config.head_dim)
    if isinstance(cache, FloatCache):
        if len(cache.k.shape) != 5:
            raise TypeError(f"`cache.k` must be 5-D, got {len(cache.k.shape)}-D.")
        dims = (wanted[0], batch, cache_rows(cache), *wanted[1:])
        for name in ("k", "v"):
            check_shape(f"cache.{name}", getattr(cache, name), ("L, B, C2, Nkv, D", dims))
        return
    check_caches(cache)
    got = (cache.layers, *cache.k_cache.shape[-2:])
    if got != wanted:
        raise ValueError(
            f"`cache` must have [layers, Nkv, D] = {list(wanted)} as `model` has, got {list(got)}."
        )
