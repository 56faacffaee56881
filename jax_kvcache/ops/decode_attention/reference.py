"""Decode attention in jax.numpy: a running softmax over chunks of rows, in float32."""

import dataclasses
import math
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_kvcache.ops.decode_attention import cudnn
from jax_kvcache.ops.decode_attention.chunks import Chunks
from jax_kvcache.ops.decode_attention.softmax import Softmax, product
from jax_kvcache.ops.implementation import Options
from jax_kvcache.ops.operands import Operand, Result, group_rank_of, is_absent
from jax_kvcache.ops.slots import Axes, is_row, unravel_in_bounds

# Queries of one sequence that go through the rows together.
_TILE = 256

# Chunks whose sums are added up before they join the others'. The roundings of a sum of many equal
# numbers may all go one way: 100,000 rows are 782 chunks, but in two stages 32 and 25 additions.
_CHUNKS_PER_SUM = 32


class Operands(NamedTuple):
    """The primitive's operands in order; `ops.operands` explains the dimensions.

    A contiguous cache is a paged one with one block per sequence. NB = prod(n) blocks of R rows per
    group; row m * R + i of a sequence is row i of its block table[m].
    """

    # float16, bfloat16 or float32
    q: Annotated[jax.Array, Operand("*g B S Nq D")]
    # int8
    k_cache: Annotated[jax.Array, Operand("*g' *n R Nkv D", cache=True)]
    v_cache: Annotated[jax.Array, Operand("*g' *n R Nkv D", cache=True)]
    # int32, flat block number over n; outside [0, NB): no block, its rows are not seen
    table: Annotated[jax.Array, Operand("*g B M")]
    # int32, the last row that the query sees; negative: it sees nothing
    positions: Annotated[jax.Array, Operand("*g B S")]
    # float32
    scale_k: Annotated[jax.Array, Operand("*g' Nkv D")]
    scale_v: Annotated[jax.Array, Operand("*g' Nkv D")]
    offset_k: Annotated[jax.Array, Operand("*g' Nkv D", optional=True)]
    offset_v: Annotated[jax.Array, Operand("*g' Nkv D", optional=True)]
    sinks: Annotated[jax.Array, Operand("*g' Nq", optional=True)]


class Results(NamedTuple):
    """The primitive's results in order; lse is [0] unless it is wanted."""

    out: Annotated[jax.Array, Result("*g B S Nq D", dtype_of="q")]
    lse: Annotated[jax.Array, Result("*g B S Nq", option="return_lse")]


@dataclasses.dataclass(frozen=True)
class AttentionOptions(Options):
    """The primitive's static parameters.

    Attributes:
      scale: factor of the scores.
      window: a query sees the last `window` rows up to its own; 0: all of them.
      soft_cap: the scores become soft_cap * tanh(score / soft_cap); 0: they stay.
      return_lse: whether the log-sum-exp is a result.
      contiguous: whether sequence b reads block b of the last block dimension, of one layer.
      consecutive: whether the positions of a sequence follow each other; known from `lengths`. For
        paged blocks over devices they do before each device hides those of the others.
      partial: whether the caller may merge this with the rest; only checkify's rule asks.
      axes: inside `jax.shard_map`, the axes that the rows are spread over; likewise.
    """

    scale: float
    window: int
    soft_cap: float
    return_lse: bool
    contiguous: bool
    consecutive: bool
    partial: bool
    axes: Axes

    def attributes(self) -> dict[str, Any]:
        """What the native target takes beside its operands."""
        return {
            "scale": np.float32(self.scale),
            "window": np.int64(self.window),
            "soft_cap": np.float32(self.soft_cap),
            "return_lse": self.return_lse,
        }


def decode_attention_reference(
    operands: Operands, options: AttentionOptions, platform: str
) -> Results:
    """The whole operator on the primitive's operands."""
    ops = _without_groups(operands, options.contiguous)
    steps = ops.q.shape[1]
    if platform == "cuda" and cudnn.refusal(operands, options) is None:
        out, lse = cudnn.attend(ops, options)
    elif isinstance(steps, int) and steps > _TILE:
        out, lse = _over_tiles(ops, options, platform)
    else:
        out, lse = _tile(ops, options, platform, ops.q, ops.positions)
    out = out.astype(operands.q.dtype).reshape(operands.q.shape)
    if not options.return_lse:
        return Results(out, jnp.zeros((0,), jnp.float32))
    return Results(out, lse.reshape(operands.q.shape[:-1]))


class _Flat(NamedTuple):
    """The operands with group dimensions folded into the sequences; the caches as they are."""

    q: jax.Array  # [B, S, Nq, D]
    k_cache: jax.Array
    v_cache: jax.Array
    positions: jax.Array  # [B, S]
    scale_k: jax.Array  # [B or 1, Nkv, D]
    scale_v: jax.Array
    offset_k: jax.Array | None
    offset_v: jax.Array | None
    sinks: jax.Array | None  # [B or 1, Nq]
    blocks: tuple[Any, ...]  # of each dimension before R, the number that [B, M] entries name
    exists: jax.Array  # [B, M], whether the table names a block
    contiguous: bool  # whether sequence b reads block b of the last of these dimensions


def _without_groups(ops: Operands, contiguous: bool) -> _Flat:
    rank = group_rank_of(ops)
    groups = ops.q.shape[:rank]
    batch, count = ops.q.shape[rank], math.prod(groups)

    def fold(value: jax.Array) -> jax.Array:
        return value.reshape(count * batch, *value.shape[rank + 1 :])

    def parameter(value: jax.Array) -> jax.Array | None:
        if is_absent(value):
            return None
        own = value.shape[rank:]
        if all(size == 1 for size in value.shape[:rank]):
            return value.reshape(1, *own)
        value = jnp.broadcast_to(value, (*groups, *own)).reshape(count, 1, *own)
        return jnp.broadcast_to(value, (count, batch, *own)).reshape(count * batch, *own)

    table = fold(ops.table)
    n_dims = ops.k_cache.shape[rank:-3]
    exists = is_row(table, math.prod(n_dims))
    number = jnp.where(exists, table, 0)
    blocks: list[Any] = []
    blocks += reversed(unravel_in_bounds(number, n_dims))
    sequence = jnp.arange(count * batch, dtype=jnp.int32)[:, None] // batch
    for group in reversed(groups):  # a cache that all examples share has 1, to which reads clip
        blocks.append(jnp.broadcast_to(sequence % group, table.shape))
        sequence = sequence // group
    scale_k, scale_v = parameter(ops.scale_k), parameter(ops.scale_v)
    assert scale_k is not None
    assert scale_v is not None
    return _Flat(
        fold(ops.q), ops.k_cache, ops.v_cache, fold(ops.positions), scale_k, scale_v,
        parameter(ops.offset_k), parameter(ops.offset_v), parameter(ops.sinks),
        tuple(reversed(blocks)), exists, contiguous and not groups,
    )  # fmt: skip


def _over_tiles(ops: _Flat, options: AttentionOptions, platform: str) -> tuple[Any, Any]:
    """Tiles of queries one after the other, each over the rows that it sees."""
    batch, steps = ops.q.shape[:2]
    tiles = -(-steps // _TILE)
    more = tiles * _TILE - steps

    def cut(value: jax.Array, padding: int) -> jax.Array:
        width = [(0, 0), (0, more)] + [(0, 0)] * (value.ndim - 2)
        value = jnp.pad(value, width, constant_values=padding)
        return jnp.moveaxis(value.reshape(batch, tiles, _TILE, *value.shape[2:]), 1, 0)

    def one(tile: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return _tile(ops, options, platform, *tile)

    out, lse = lax.map(one, (cut(ops.q, 0), cut(ops.positions, -1)))
    whole = [jnp.moveaxis(a, 0, 1).reshape(batch, tiles * _TILE, *a.shape[3:]) for a in (out, lse)]
    return whole[0][:, :steps], whole[1][:, :steps]


def _tile(
    ops: _Flat, options: AttentionOptions, platform: str, q: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Some queries: q [B, S, Nq, D], positions [B, S]; out like q in float32, lse [B, S, Nq]."""
    batch, steps, q_heads, head_dim = q.shape
    kv_heads = ops.k_cache.shape[-2]
    factor = ops.scale_k * jnp.float32(options.scale)
    grouped = q.astype(jnp.float32).reshape(batch, steps, kv_heads, q_heads // kv_heads, head_dim)
    grouped = grouped * factor[:, None, :, None, :]
    chunks = Chunks.of(ops, platform, steps)

    def fold_in(step: jax.Array, state: Softmax) -> Softmax:
        rows, present = chunks.rows(step)  # [c] and [B or 1, c]
        seen = present[:, None, :] & (rows[None, None, :] <= positions[:, :, None])
        if options.window:
            # The difference of two numbers that are not negative cannot wrap around.
            seen = seen & (positions[:, :, None] - rows[None, None, :] < options.window)
        scores = product("bsngd,bcnd->bngsc", grouped, chunks.read(ops.k_cache, ops.offset_k, step))
        if options.soft_cap:
            scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
        return state.add(seen[:, None, None], scores, chunks.read(ops.v_cache, ops.offset_v, step))

    start = Softmax.of_nothing(positions, grouped.transpose(0, 2, 3, 1, 4))
    first, last = chunks.bounds(positions, options.window)

    def sum_some(number: jax.Array, state: Softmax) -> Softmax:
        begin = first + number * _CHUNKS_PER_SUM
        end = jnp.minimum(begin + _CHUNKS_PER_SUM, last)
        return state.merged(lax.fori_loop(begin, end, fold_in, start))

    state = lax.fori_loop(0, -(-(last - first) // _CHUNKS_PER_SUM), sum_some, start)
    return _finish(state, ops)


def _finish(state: Softmax, ops: _Flat) -> tuple[jax.Array, jax.Array]:
    seen = jnp.broadcast_to(state.seen, state.peak.shape)
    lse = jnp.where(seen, state.peak + jnp.log(state.total), -jnp.inf)
    total, sums = state.total, state.sums
    if ops.sinks is not None:
        sinks = ops.sinks.reshape(-1, *state.peak.shape[1:3], 1)
        peak = jnp.maximum(state.peak, sinks)
        kept = jnp.exp(state.peak - peak)
        total, sums = total * kept + jnp.exp(sinks - peak), sums * kept[..., None]
    mean = sums / jnp.where(seen, total, 1.0)[..., None]
    out = jnp.where(seen[..., None], mean * ops.scale_v[:, :, None, None, :], 0.0)
    batch, kv_heads, group, steps, head_dim = out.shape
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, steps, kv_heads * group, head_dim)
    return out, lse.transpose(0, 3, 1, 2).reshape(batch, steps, kv_heads * group)
