"""Prefill on an NVIDIA GPU: cuDNN over rows of the cache in float16, merged by log-sum-exp.

cuDNN rounds its operands, the weights of the softmax and the results of each call to one dtype. In
bfloat16 the roundings of the calls that are merged, and that of the whole, would make a larger
error than attention over a bfloat16 cache of the exact values has. In float16 they are an eighth of
that, and the rounding of the whole to bfloat16 is most of the error. This is for bfloat16 queries
alone: float16 is too coarse for float32, and for float16 the merged roundings count again.

float16's range suffices because cuDNN reads codes: K's scale is multiplied into q, and V's into the
results. Two limits remain. Weights below 2**-14 of a call's largest are rounded to multiples of
2**-24 of it: beside a row that has nearly all the weight, the others count less exactly than in
bfloat16. cuDNN masks a row by -2**15: a masked row counts if its score is about as much above the
scores of the rows that the query sees.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_kvcache import _compat
from jax_kvcache.backends import cuda
from jax_kvcache.ops.decode_attention.cudnn_partial import Partial, first_query_first
from jax_kvcache.ops.decode_attention.merge import normalise
from jax_kvcache.ops.slots import INT32_MAX

_MOST_HEAD_DIM = 128
_MULTIPLE = 128  # rows that are read together are a multiple of this
_MASKED_ROWS = 2048  # that are read together under a mask
_BUDGET = 256 << 20  # bytes that the rows of K and V that are read together take
_SAMPLE = 1024  # rows that the mean of V's codes is estimated from
_DTYPE = jnp.float16  # of cuDNN's operands and results


def refusal(operands: Any, options: Any) -> str | None:
    """Why cuDNN does not take a call, or None."""
    queries, _, head_dim = operands.q.shape[-3:]
    shapes = (*operands.q.shape, *operands.table.shape, *operands.k_cache.shape)
    if not all(isinstance(size, int) for size in shapes):
        return "the shapes are not known"
    if queries <= cuda.MAX_QUERIES:  # a decode step, which reads the codes as they lie
        least = cuda.MAX_QUERIES + 1
        return f"cuDNN is for S >= {least} queries per sequence, got S = {queries}"
    if operands.q.dtype != jnp.bfloat16:
        return f"cuDNN is for q in bfloat16, got {operands.q.dtype}"
    if head_dim > _MOST_HEAD_DIM or head_dim % 8:
        return f"cuDNN is for D <= {_MOST_HEAD_DIM} and a multiple of 8, got D = {head_dim}"
    if options.soft_cap:
        return "cuDNN has no soft cap"
    if not cuda.is_here():
        return cuda.NO_GPU
    return None if _compat.has_cudnn() else "JAX was built without cuDNN"


def attend(ops: Any, options: Any) -> tuple[jax.Array, jax.Array]:
    """The operator on the reference's flat operands.

    The first rows of a sequence, which all of its queries see, need no mask. Of the others, the
    rows that its queries see differently, there are S where its queries are consecutive, beside
    padding: a causal call reads these. Those of other sequences are read under a mask, and so are
    rows past a missing block and rows under a window.

    Beside q and the results, memory holds some rows of K and V in float16. Of each sequence these
    are as many as 256 MB have room for, or 128; S in the causal call, and 2,048 under a mask, which
    itself is [B, S, 2048] float16. Each number is rounded up to a multiple of 128, and is no larger
    than the cache needs.

    Args:
      ops: the reference's flat operands.
      options: the primitive's options.

    Returns:
      out [B, S, Nq, D] float32 and lse [B, S, Nq] float32, without the sinks.
    """
    if options.window:
        parts = _Parts(ops, options)
        return _values(ops, options, parts.centre, _under_masks(parts))
    moved, early = first_query_first(ops)
    parts = _Parts(moved, options)
    return _values(ops, options, parts.centre, _with_causal_call(parts, options).moved(early))


def _under_masks(parts: "_Parts") -> Partial:
    """With a window, whose rows differ from query to query."""
    begin = jnp.clip(parts.first - (parts.window - 1), 0, parts.rows.capacity)
    # What the window and consecutive queries span.
    size = parts.most_masked(parts.positions.shape[1] + parts.window - 1)
    part = functools.partial(parts.masked, size=size, begin=begin)
    needed = (parts.end - begin).max(initial=0)
    return parts.remaining(part, size, needed, part(jnp.int32(0)), done=1)


def _with_causal_call(parts: "_Parts", options: Any) -> Partial:
    """Without a window; query 0 of each sequence sees something."""
    there = parts.rows.there()
    shared = jnp.minimum(parts.first, jnp.minimum(parts.end, there))
    step = jnp.arange(parts.positions.shape[1], dtype=jnp.int32)
    consecutive = (parts.positions == parts.first[:, None] + step) | (parts.positions < 0)
    end_of_causal = jnp.where(consecutive.all(axis=1), there, shared)

    # The host waits for the condition of a loop whose length is not known before. So the first call
    # reads as many rows as it may even where few are shared, and the loop over masked rows, which
    # mostly has no steps, is last: all kernels before it are launched then.
    size = parts.rows.most_together()
    part = functools.partial(parts.unmasked, size=size, end=shared)
    total = parts.remaining(part, size, shared.max(initial=0), part(jnp.int32(0)), done=1)
    total = total.merged(parts.causal(shared, end_of_causal))
    if options.consecutive and options.contiguous:  # a sequence has all of its rows, or none
        return total
    size = parts.most_masked(parts.rows.capacity)
    part = functools.partial(parts.masked, size=size, begin=end_of_causal)
    return parts.remaining(part, size, (parts.end - end_of_causal).max(initial=0), total, done=0)


class _Parts:
    """The queries of a prefill, and calls of cuDNN over some of the rows that they see.

    Attributes:
      first: [B], the position of the first query that sees something; INT32_MAX if none does.
      end: [B], the number of the first row that no query sees.
      centre: [B, Nkv, D], about the mean of V's codes.
    """

    def __init__(self, ops: Any, options: Any):
        self.rows = _Rows(ops)
        self.window = options.window
        self.positions = ops.positions
        self.first = jnp.where(self.positions < 0, INT32_MAX, self.positions).min(axis=1)
        self.end = jnp.clip(self.positions, -1, self.rows.capacity - 1).max(axis=1) + 1
        self.centre = self.rows.mean_of_v(self.end)
        self._q = _scaled_queries(ops, options.scale)

    def unmasked(self, piece: jax.Array, size: int, end: jax.Array) -> Partial:
        """Over rows [piece * size, (piece + 1) * size) before `end` [B], which all queries see."""
        begin = piece * size
        numbers = jnp.broadcast_to(begin + jnp.arange(size, dtype=jnp.int32), (len(end), size))
        return self._before(numbers, jnp.clip(end - begin, 0, size))

    def causal(self, begin: jax.Array, end: jax.Array) -> Partial:
        """Over rows from `begin` up to `end` [B]; query s sees row begin + s and those between."""
        size = _multiple(min(self.positions.shape[1], self.rows.capacity))
        numbers = begin[:, None] + jnp.arange(size, dtype=jnp.int32)
        return self._before(numbers, jnp.clip(end - begin, 0, size), causal=True)

    def masked(self, piece: jax.Array, size: int, begin: jax.Array) -> Partial:
        """Over rows begin + piece * size and on; each query sees what its position says."""
        numbers = (begin + piece * size)[:, None] + jnp.arange(size, dtype=jnp.int32)
        rows, last = numbers[:, None, :], self.positions[:, :, None]
        seen = self.rows.exist(numbers)[:, None, :] & (rows <= last)
        if self.window:
            seen = seen & (last - rows < self.window)
        return self._call(numbers, seen.any(axis=2), mask=seen[:, None])

    def most_masked(self, rows: int) -> int:
        """How many rows are read together under a mask, of so many."""
        return min(_multiple(min(rows, self.rows.capacity)), _MASKED_ROWS)

    def remaining(
        self, part: Any, size: int, rows_needed: jax.Array, total: Partial, done: int
    ) -> Partial:
        """Merges the pieces of `size` rows that are needed, from number `done` on."""
        if self.rows.capacity <= size * done:
            return total
        pieces = -(-rows_needed // size)
        return lax.fori_loop(done, pieces, lambda i, old: old.merged(part(i)), total)

    def _before(self, numbers: jax.Array, lengths: jax.Array, causal: bool = False) -> Partial:
        """Over the first `lengths` [B] of rows [B, c]."""
        seen = (lengths > 0)[:, None] & (self.positions >= 0)
        return self._call(numbers, seen, kv_lengths=lengths, causal=causal)

    def _call(self, numbers: jax.Array, seen: jax.Array, **keywords: Any) -> Partial:
        """Over rows [B, c]; `seen` [B, S]: whether a query sees any of them."""
        k, v = self.rows.read(numbers)
        # The results are then near zero, where rounding changes them less.
        v = v - self.centre[:, None].astype(_DTYPE)
        out, lse = _compat.cudnn_attention(self._q, k, v, scale=1.0, **keywords)
        seen = seen[:, :, None]
        out = jnp.where(seen[..., None], out.astype(jnp.float32), 0.0)
        return Partial(out, jnp.where(seen, lse, -jnp.inf))


def _multiple(size: int) -> int:
    return -(-size // _MULTIPLE) * _MULTIPLE


def _of_queries(parameter: jax.Array, ops: Any) -> jax.Array:
    """A parameter [B or 1, Nkv, D] for each query head: [B or 1, 1, Nq, D]."""
    return jnp.repeat(parameter, ops.q.shape[-2] // parameter.shape[1], axis=1)[:, None]


def _scaled_queries(ops: Any, scale: float) -> jax.Array:
    """q such that its products with K's codes are scores; of finite ones, the nearest there is."""
    most = float(jnp.finfo(_DTYPE).max)
    q = ops.q.astype(jnp.float32) * (_of_queries(ops.scale_k, ops) * jnp.float32(scale))
    return jnp.where(jnp.isfinite(q), jnp.clip(q, -most, most), q).astype(_DTYPE)


def _values(
    ops: Any, options: Any, centre: jax.Array, total: Partial
) -> tuple[jax.Array, jax.Array]:
    """out and lse of attention over K's codes and V's codes less `centre`."""
    out, lse = total
    seen = lse != -jnp.inf
    middle = centre if ops.offset_v is None else centre - ops.offset_v
    out = (out + _of_queries(middle, ops)) * _of_queries(ops.scale_v, ops)
    out = jnp.where(seen[..., None], out, 0.0)
    if ops.offset_k is not None:  # which changes all scores of a query alike, and so no weight
        q = _scaled_queries(ops, options.scale).astype(jnp.float32)
        lse = jnp.where(seen, lse - (q * _of_queries(ops.offset_k, ops)).sum(axis=-1), lse)
    if ops.sinks is not None:
        out = normalise(out, jnp.ones_like(lse), lse, ops.sinks[:, None, :])
    return out, lse


class _Rows:
    """The rows of the cache that each sequence has."""

    def __init__(self, ops: Any):
        self._ops = ops
        self._block_rows, self._kv_heads, self._head_dim = ops.k_cache.shape[-3:]
        self.capacity = min(ops.exists.shape[1] * self._block_rows, INT32_MAX)

    def most_together(self) -> int:
        """How many rows of each sequence may be read together: a multiple of 128."""
        batch = len(self._ops.exists)
        per_row = 2 * 2 * max(batch, 1) * self._kv_heads * self._head_dim
        fit = max(_BUDGET // per_row // _MULTIPLE, 1)
        return min(fit * _MULTIPLE, _multiple(self.capacity))

    def there(self) -> jax.Array:
        """How many rows there are before the first one whose block is missing: [B]."""
        missing = ~self._ops.exists
        blocks = jnp.where(missing.any(axis=1), missing.argmax(axis=1), missing.shape[1])
        blocks = jnp.minimum(blocks, INT32_MAX // self._block_rows)
        return blocks.astype(jnp.int32) * self._block_rows

    def exist(self, numbers: jax.Array) -> jax.Array:
        """Whether rows [B, c] are there; a negative one, past the last int32, is not."""
        block = numbers // self._block_rows
        exists = self._ops.exists
        found = jnp.take_along_axis(exists, block, axis=1, mode="fill", fill_value=False)
        return found & (numbers >= 0)

    def mean_of_v(self, end: jax.Array) -> jax.Array:
        """The mean of V's codes, from some of the rows before `end` [B]: whole, [B, Nkv, D]."""
        count = jnp.maximum(end, 1)[:, None]
        some = jnp.arange(_SAMPLE, dtype=jnp.int32) * jnp.maximum(count // _SAMPLE, 1) % count
        return jnp.round(self.read(some)[1].astype(jnp.float32).mean(axis=1))

    def read(self, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The codes of rows [B, c] of K and of V: [B, c, Nkv, D]."""
        ops = self._ops
        block = numbers // self._block_rows
        place = tuple(jnp.take_along_axis(n, block, axis=1, mode="clip") for n in ops.blocks)
        place += (numbers % self._block_rows,)
        k, v = (codes.at[place].get(mode="clip") for codes in (ops.k_cache, ops.v_cache))
        return k.astype(_DTYPE), v.astype(_DTYPE)
