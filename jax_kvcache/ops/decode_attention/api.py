"""Attention of new queries over an int8 KV cache, read as it lies."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_kvcache.caches import KVCache, PagedKVCache
from jax_kvcache.caches.checks import check_caches, layer_index
from jax_kvcache.ops.checks import FLOATS, check_array, check_int32

# Rows of each sequence that one step of the loop reads.  Long enough that a step's work hides the
# loop's cost, short enough that the float32 copy of a chunk stays small beside the cache.
_CHUNK_ROWS = 128


def decode_attention(
    q: jax.Array,
    cache: KVCache | PagedKVCache,
    lengths: ArrayLike,
    *,
    block_table: ArrayLike | None = None,
    layer: ArrayLike | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Attention of S new tokens per sequence over the rows of an int8 cache.

    `softmax(scale * q @ k.T) @ v` with k and v = (code - offset) * scale of the channel, where
    query head j reads cache head j // (Nq / Nkv) and query s sees rows < lengths - S + s + 1.
    The arithmetic is float32.

    What it costs: the cache is read in chunks of 128 rows per sequence by a loop that ends with
    the longest of `lengths`, so time follows the rows in use and not the cache's size.  Each of K
    and V needs one chunk in float32, [B, 128, Nkv, D], besides scores of [B, Nq, S, 128]; neither
    the cache nor a layer of it is ever dequantised, gathered or copied as a whole.  The scales
    cost nothing per row: K's is multiplied into q and V's into the output; V's offset is
    subtracted from the output, and K's adds the same number to every score of a query, which
    softmax removes.

    Args:
      q: [B, S, Nq, D] float, the operator's q; Nq is a multiple of the cache's Nkv.
      cache: the cache that already holds the S new tokens' rows.
      lengths: [B] int32, valid rows of each sequence, the S new ones included.  0 gives zeros.
      block_table: [B, M] int32, for a `PagedKVCache` only: the block of rows m * block_size and
        on.  Rows of a block outside [0, num_blocks) are not seen.
      layer: the layer to read, an int or an integer scalar; for a cache with layers only. A traced
        one that does not exist reads the nearest.
      scale: factor of the scores; None is D ** -0.5.

    Returns:
      [B, S, Nq, D] in the dtype of q.

    Raises:
      TypeError: a dtype or rank is not as above, or an argument does not go with this cache.
      ValueError: a shape is not as above.
    """
    lengths = jnp.maximum(check_int32("lengths", lengths, "B"), 0)
    table = None if block_table is None else check_int32("block_table", block_table, "B, M")
    _check(q, cache, lengths, table, scale)
    at = layer_index(cache.layers, layer)
    layer = None if at is None else at.number
    batch, steps, q_heads, head_dim = q.shape
    kv_heads = cache.k_cache.shape[-2]
    scale_k, scale_v, offset_v = cache.scale_k, cache.scale_v, cache.offset_v
    if layer is not None:
        scale_k, scale_v = scale_k[layer], scale_v[layer]
        offset_v = None if offset_v is None else offset_v[layer]

    factor = scale_k * (head_dim**-0.5 if scale is None else scale)  # [Nkv, D]
    grouped = q.astype(jnp.float32).reshape(batch, steps, kv_heads, q_heads // kv_heads, head_dim)
    grouped = grouped * factor[None, None, :, None, :]
    capacity = (cache.k_cache.shape[-3]) * (1 if table is None else table.shape[1])
    chunk = min(_CHUNK_ROWS, capacity)
    limit = lengths[:, None] - steps + 1 + jnp.arange(steps, dtype=jnp.int32)[None, :]  # [B, S]

    def read(codes: jax.Array, rows: jax.Array, blocks: jax.Array | None) -> jax.Array:
        if blocks is None:
            chunk_codes = _slice_rows(codes, rows[0], chunk, batch, layer)
        else:
            chunk_codes = _gather_rows(codes, blocks, rows % codes.shape[-3], layer)
        return chunk_codes.astype(jnp.float32)  # [B, chunk, Nkv, D]

    def fold_in(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Adds one chunk of rows to the running softmax."""
        # [B, 1, 1, S], [B, Nkv, G, S], the same, [B, Nkv, G, S, D]
        any_seen, peak, total, sums = state
        first = jnp.minimum(i * chunk, capacity - chunk)
        rows = first + jnp.arange(chunk, dtype=jnp.int32)
        fresh = (rows >= i * chunk)[None, :]  # the last chunk reaches back to stay inside
        blocks = None
        if table is not None:
            blocks = jnp.take(table, rows // cache.k_cache.shape[-3], axis=1)  # [B, chunk]
            fresh = fresh & (blocks >= 0) & (blocks < cache.k_cache.shape[-4])
        seen = fresh[:, None, :] & (rows[None, None, :] < limit[:, :, None])  # [B, S, chunk]
        seen = seen[:, None, None]
        scores = jnp.einsum("bsngd,bcnd->bngsc", grouped, read(cache.k_cache, rows, blocks))
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
        new_peak = jnp.maximum(peak, scores.max(axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - new_peak[..., None]), 0.0)
        kept = jnp.exp(peak - new_peak)
        values = jnp.einsum("bngsc,bcnd->bngsd", weights, read(cache.v_cache, rows, blocks))
        return (
            any_seen | seen.any(axis=-1),
            new_peak,
            total * kept + weights.sum(axis=-1),
            sums * kept[..., None] + values,
        )

    start = jnp.zeros_like(grouped.transpose(0, 2, 3, 1, 4))  # [B, Nkv, G, S, D]
    peak = jnp.full_like(start[..., 0], jnp.finfo(jnp.float32).min)
    longest = jnp.clip(lengths.max(initial=0), 0, capacity)
    any_seen = jnp.zeros_like(peak[:, :1, :1], bool)
    any_seen, _, total, sums = jax.lax.fori_loop(
        0, -(-longest // chunk), fold_in, (any_seen, peak, start[..., 0], start)
    )
    mean = sums / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    if offset_v is not None:
        mean = mean - offset_v[None, :, None, None, :]
    out = jnp.where(any_seen[..., None], mean * scale_v[None, :, None, None, :], 0.0)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, steps, q_heads, head_dim).astype(q.dtype)


def _slice_rows(
    codes: jax.Array, first: jax.Array, count: int, batch: int, layer: jax.Array | None
) -> jax.Array:
    """Rows first .. first + count - 1 of every sequence: [B, count, Nkv, D]."""
    zero = jnp.zeros((), jnp.int32)
    starts, sizes = (zero, first, zero, zero), (batch, count, *codes.shape[-2:])
    if layer is None:
        return jax.lax.dynamic_slice(codes, starts, sizes)
    return jax.lax.dynamic_slice(codes, (layer, *starts), (1, *sizes))[0]


def _gather_rows(
    codes: jax.Array, blocks: jax.Array, rows: jax.Array, layer: jax.Array | None
) -> jax.Array:
    """Row rows[c] of block blocks[b, c]: [B, chunk, Nkv, D]."""
    rows = jnp.broadcast_to(rows[None, :], blocks.shape)
    if layer is None:
        return codes.at[blocks, rows].get(mode="clip")
    return codes.at[jnp.broadcast_to(layer, blocks.shape), blocks, rows].get(mode="clip")


def _check(
    q: jax.Array,
    cache: KVCache | PagedKVCache,
    lengths: jax.Array,
    table: jax.Array | None,
    scale: float | None,
) -> None:
    """Raises for every argument of `decode_attention` that does not fit the others."""
    if not isinstance(cache, KVCache | PagedKVCache):
        raise TypeError(f"`cache` must be a KVCache or a PagedKVCache, got {type(cache).__name__}.")
    check_caches(cache)
    check_array("q", q, FLOATS, (4,))
    if not _is_real_or_none(scale):
        raise TypeError(f"`scale` must be a real number, got {scale!r}.")
    batch, _, q_heads, head_dim = q.shape
    for name, value in (("lengths", lengths), ("block_table", table)):
        if value is not None and value.shape[0] != batch:
            raise ValueError(
                f"`{name}` must have one entry per sequence of `q` = {batch}, got {value.shape[0]}."
            )
    blocks, _, kv_heads, cache_dim = cache.k_cache.shape[-4:]
    if head_dim != cache_dim or q_heads % kv_heads or not q_heads:
        raise ValueError(
            "`q` must have shape [B, S, Nq, D] with D = "
            f"{cache_dim} and Nq a multiple of Nkv = {kv_heads}, got {list(q.shape)}."
        )
    if isinstance(cache, KVCache):
        if table is not None:
            raise TypeError(
                "`block_table` must be None for a KVCache: only a PagedKVCache has one."
            )
        if batch > blocks:
            raise ValueError(
                f"`q` must have at most as many sequences as the cache = {blocks}, got {batch}."
            )
        return
    if table is None:
        raise TypeError("`block_table` is required for a PagedKVCache, got None.")
    if not table.shape[1]:
        raise ValueError("`block_table` must have at least one column, got [B, 0].")


def _is_real_or_none(value: ArrayLike | None) -> bool:
    if isinstance(value, jax.Array):
        return not value.ndim and jnp.issubdtype(value.dtype, jnp.floating)
    return value is None or isinstance(value, int | float | np.integer | np.floating)
