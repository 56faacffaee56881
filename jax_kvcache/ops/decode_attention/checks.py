"""The checks of a call of `decode_attention`: what a wrong one gets before it runs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvcache.caches import KVCache, PagedKVCache
from jax_kvcache.caches.checks import check_caches
from jax_kvcache.ops.checks import (
    FLOAT32,
    FLOATS,
    check_array,
    check_axis_name,
    check_int,
    check_int32,
    check_shape,
)
from jax_kvcache.ops.implementation import check_implementation
from jax_kvcache.ops.slots import INT32_MAX

_SMALLEST, _LARGEST = (float(getattr(jnp.finfo(jnp.float32), name)) for name in ("tiny", "max"))


class Call(NamedTuple):
    """The public function's arguments; see `decode_attention`."""

    q: Any
    cache: Any
    lengths: Any = None
    positions: Any = None
    axis_name: Any = None  # after `check_call` a tuple
    block_table: Any = None
    layer: Any = None
    scale: Any = None
    window: Any = None
    soft_cap: Any = None
    sinks: Any = None
    return_lse: Any = False
    implementation: Any = None


def check_call(call: Call) -> Call:
    """Checks a call; returns it with arrays for lists, and what is None by default filled in."""
    q, cache = call.q, call.cache
    if not isinstance(cache, KVCache | PagedKVCache):
        raise TypeError(f"`cache` must be a KVCache or a PagedKVCache, got {type(cache).__name__}.")
    check_caches(cache)
    check_array("q", q, FLOATS, (4,))
    check_implementation(call.implementation)
    blocks, _, kv_heads, cache_dim = cache.k_cache.shape[-4:]
    batch, steps, q_heads, head_dim = q.shape
    if head_dim != cache_dim or q_heads % kv_heads or not q_heads:
        raise ValueError(
            "`q` must have shape [B, S, Nq, D] with D = "
            f"{cache_dim} and Nq a multiple of Nkv = {kv_heads}, got {list(q.shape)}."
        )
    call = _check_queries(call, batch, steps)
    call = _check_block_table(call, batch, blocks)
    if call.sinks is not None:
        check_array("sinks", call.sinks, FLOAT32, (1,))
        check_shape("sinks", call.sinks, ("Nq", (q_heads,)))
    if not isinstance(call.return_lse, bool | np.bool_):
        raise TypeError(f"`return_lse` must be a bool, got {call.return_lse!r}.")
    scale = head_dim**-0.5 if call.scale is None else call.scale
    if not _is_real(scale):
        raise TypeError(f"`scale` must be a real number, got {scale!r}.")
    if not isinstance(scale, jax.Array) and not abs(scale) <= _LARGEST:
        raise ValueError(f"`scale` must be finite in float32, got {scale}.")
    return call._replace(
        scale=scale,
        window=_check_window(call.window),
        soft_cap=_check_soft_cap(call.soft_cap),
        axis_name=check_axis_name(call.axis_name),
    )


def _check_queries(call: Call, batch: Any, steps: Any) -> Call:
    """Exactly one of `lengths` and `positions`; both leave as `positions`."""
    if (call.lengths is None) == (call.positions is None):
        given = "neither" if call.lengths is None else "both"
        raise TypeError(
            f"exactly one of `lengths` [B] and `positions` [B, S] must be given, got {given}."
        )
    if call.positions is not None:
        positions = check_int32("positions", call.positions, "B, S")
        check_shape("positions", positions, ("B, S", (batch, steps)))
        return call._replace(positions=positions)
    lengths = check_int32("lengths", call.lengths, "B")
    if lengths.shape[0] != batch:
        raise ValueError(
            f"`lengths` must have one entry per sequence of `q` = {batch}, got {lengths.shape[0]}."
        )
    first = jnp.maximum(lengths, 0)[:, None] - jnp.asarray(steps, jnp.int32)
    step = jnp.arange(steps, dtype=jnp.int32)[None, :]
    return call._replace(lengths=None, positions=first + step)


def _check_block_table(call: Call, batch: Any, blocks: Any) -> Call:
    if isinstance(call.cache, KVCache):
        if call.block_table is not None:
            raise TypeError(
                "`block_table` must be None for a KVCache: only a PagedKVCache has one."
            )
        if isinstance(batch, int) and isinstance(blocks, int) and batch > blocks:
            raise ValueError(
                f"`q` must have at most as many sequences as the cache = {blocks}, got {batch}."
            )
        return call
    if call.block_table is None:
        raise TypeError("`block_table` is required for a PagedKVCache, got None.")
    table = check_int32("block_table", call.block_table, "B, M")
    if table.shape[0] != batch:
        raise ValueError(
            f"`block_table` must have one entry per sequence of `q` = {batch}, "
            f"got {table.shape[0]}."
        )
    if isinstance(table.shape[1], int) and not table.shape[1]:
        raise ValueError("`block_table` must have at least one column, got [B, 0].")
    return call._replace(block_table=table)


def _check_window(window: Any) -> int:
    """`window` as a number; 0 for None."""
    if window is None:
        return 0
    if check_int("window", window) < 1:
        raise ValueError(f"`window` must be at least 1, got {window}. None sees all rows.")
    return int(window) if window <= INT32_MAX else 0  # no position is that far


def _check_soft_cap(soft_cap: Any) -> float:
    """`soft_cap` as a number; 0 for None."""
    if soft_cap is None:
        return 0.0
    if isinstance(soft_cap, bool) or not isinstance(soft_cap, int | float | np.number):
        raise TypeError(f"`soft_cap` must be a real number, got {soft_cap!r}.")
    if not _SMALLEST <= soft_cap <= _LARGEST:
        raise ValueError(f"`soft_cap` must be a normal float32 above 0, got {soft_cap}.")
    return float(soft_cap)


def _is_real(value: Any) -> bool:
    if isinstance(value, jax.Array):
        return not value.ndim and jnp.issubdtype(value.dtype, jnp.floating)
    number = isinstance(value, int | float | np.integer | np.floating)
    return number and not isinstance(value, bool)
