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

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_kvcache import _compat
from jax_kvcache.backends import cuda
from jax_kvcache.ops.decode_attention.cudnn_queries import Partial, first_query_first
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


def attend(
    ops: Any, options: Any, attention: Callable[..., tuple[jax.Array, jax.Array]]
) -> tuple[jax.Array, jax.Array]:
    """The operator on the reference's flat operands.

    The first rows of a sequence, which all of its queries see, need no mask. Of the others, the
    rows that its queries see differently, there are S where its queries are consecutive, beside
    padding: a causal call reads these. Those of other sequences are read under a mask, and so are
    rows past a missing block and rows under a window.

    Beside q and the results, memory holds some rows of K and V in float16: 256 MB or 128 rows of
    each sequence, whichever is more, and S rows of each in the causal call. Under a mask it holds
    at most 2,048 rows of each sequence, and the mask as [B, S, 2048] float16.

    Args:
      ops: the reference's flat operands.
      options: the primitive's options.
      attention: `_compat.cudnn_attention`, or what computes the same.

    Returns:
      out [B, S, Nq, D] float32 and lse [B, S, Nq] float32, without the sinks.
    """
    given = ops
    ops, early = first_query_first(given)
    rows = _Rows(ops)
    queries = ops.q.shape[1]
    q = _scaled_queries(ops, options.scale)
    positions = ops.positions
    sees = positions >= 0
    there = rows.there()
    # Of the queries that see something, [B]:
    # The largest int32, to which nothing can be added, names no row.
    first = jnp.where(sees, jnp.minimum(positions, INT32_MAX - 1), INT32_MAX - 1).min(axis=1)
    last = jnp.minimum(positions, rows.capacity - 1).max(axis=1)
    centre = rows.mean_of_v(last)
    step = jnp.arange(queries, dtype=jnp.int32)
    consecutive = (positions == first[:, None] + step) | ~sees
    causal = consecutive.all(axis=1) & (not options.window)
    if options.window:
        shared = jnp.zeros_like(first)
        begin = jnp.clip(first - (options.window - 1), 0, rows.capacity)
    else:
        shared = jnp.where(last >= 0, jnp.minimum(first, there), 0)
        begin = jnp.where(causal, there, shared)

    def call(numbers: jax.Array, seen: jax.Array, **keywords: Any) -> Partial:
        """Attention over rows [B, c]; `seen` [B, S or 1]: whether a query sees any of them."""
        k, v = rows.read(numbers)
        # The results are then near zero, where rounding changes them less.
        v = v - centre[:, None].astype(_DTYPE)
        out, lse = attention(q, k, v, scale=1.0, **keywords)
        seen = seen[:, :, None]
        out = jnp.where(seen[..., None], out.astype(jnp.float32), 0.0)
        return Partial(out, jnp.where(seen, lse, -jnp.inf))

    def unmasked(step: jax.Array, size: int) -> Partial:
        numbers = jnp.broadcast_to(
            step * size + jnp.arange(size, dtype=jnp.int32), (len(first), size)
        )
        lengths = jnp.clip(shared - step * size, 0, size)
        return call(numbers, (lengths > 0)[:, None] & sees, kv_lengths=lengths)

    def diagonal() -> Partial:
        """Query s sees row `shared` + s of a causal sequence, and those between."""
        size = _multiple(min(queries, rows.capacity))
        numbers = shared[:, None] + jnp.arange(size, dtype=jnp.int32)
        lengths = jnp.where(causal, jnp.clip(there - shared, 0, size), 0)
        return call(numbers, (lengths > 0)[:, None] & sees, kv_lengths=lengths, causal=True)

    def masked(step: jax.Array, size: int) -> Partial:
        numbers = (begin + step * size)[:, None] + jnp.arange(size, dtype=jnp.int32)
        seen = rows.exist(numbers)[:, None, :] & (numbers[:, None, :] <= positions[:, :, None])
        if options.window:
            seen = seen & (positions[:, :, None] - numbers[:, None, :] < options.window)
        return call(numbers, seen.any(axis=2), mask=seen[:, None])

    def remaining(
        part: Callable[[jax.Array, int], Partial],
        size: int,
        rows_needed: jax.Array,
        total: Partial,
        done: int,
    ) -> Partial:
        """Merges the pieces of `size` rows that are needed, from number `done` on."""
        if rows.capacity <= size * done:
            return total
        steps = -(-rows_needed // size)
        return lax.fori_loop(done, steps, lambda i, old: old.merged(part(i, size)), total)

    # The host waits for the condition of a loop whose length is not known before. The one over the
    # masked rows, which mostly has no steps, is last, so that all kernels before it are launched.
    size = min(_multiple(queries), _MASKED_ROWS)
    needed = jnp.where(last >= 0, last + 1 - begin, 0).max(initial=0)
    if options.window:
        total = remaining(masked, size, needed, masked(jnp.int32(0), size), done=1)
    else:
        together = rows.most_together()
        total = unmasked(jnp.int32(0), together)
        total = remaining(unmasked, together, shared.max(initial=0), total, done=1)
        total = total.merged(diagonal())
        # Of a contiguous cache, a sequence has all of its rows, or none.
        if not options.consecutive or not options.contiguous:
            total = remaining(masked, size, needed, total, done=0)
    return _values(given, _scaled_queries(given, options.scale), centre, total.moved(early))


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
    ops: Any, q: jax.Array, centre: jax.Array, total: Partial
) -> tuple[jax.Array, jax.Array]:
    """out and lse of attention over K's codes and V's codes less `centre`."""
    out, lse = total
    middle = centre if ops.offset_v is None else centre - ops.offset_v
    out = (out + _of_queries(middle, ops)) * _of_queries(ops.scale_v, ops)
    out = jnp.where(lse[..., None] == -jnp.inf, 0.0, out)
    if ops.offset_k is not None:  # which changes all scores of a query alike, and so no weight
        lse = lse - (q.astype(jnp.float32) * _of_queries(ops.offset_k, ops)).sum(axis=-1)
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
        """Whether rows [B, c] are there."""
        block = numbers // self._block_rows
        return jnp.take_along_axis(self._ops.exists, block, axis=1, mode="fill", fill_value=False)

    def mean_of_v(self, last: jax.Array) -> jax.Array:
        """The mean of V's codes, from some of the rows up to `last` [B]: whole, [B, Nkv, D]."""
        count = jnp.maximum(last + 1, 1)[:, None]
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
