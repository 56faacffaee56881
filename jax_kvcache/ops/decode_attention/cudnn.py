"""Prefill on an NVIDIA GPU: cuDNN over rows of the cache in bfloat16, merged by log-sum-exp.

The results are those of attention over a bfloat16 cache of the exact values, cuDNN's rounding of
the weights to bfloat16 included, so this is for bfloat16 queries alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_kvcache import _compat
from jax_kvcache.backends import cuda
from jax_kvcache.ops.decode_attention.merge import normalise

_MOST_HEAD_DIM = 128
_MULTIPLE = 128  # rows that are read together are a multiple of this
_MASKED_ROWS = 2048  # that are read together under a mask
_BUDGET = 256 << 20  # bytes that the rows of K and V that are read together take


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
        return f"cuDNN would compute in bfloat16, and q is {operands.q.dtype}"
    if head_dim > _MOST_HEAD_DIM or head_dim % 8:
        return f"cuDNN is for D <= {_MOST_HEAD_DIM} and a multiple of 8, got D = {head_dim}"
    if options.soft_cap:
        return "cuDNN has no soft cap"
    if not cuda.is_here():
        return cuda.NO_GPU
    return None if _compat.has_cudnn() else "JAX was built without cuDNN"


class Partial(NamedTuple):
    """Attention over some rows: out [B, S, Nq, D]; lse [B, S, Nq], -inf where nothing is seen."""

    out: jax.Array
    lse: jax.Array

    def merged(self, other: "Partial") -> "Partial":
        """Attention over the rows of both."""
        lse = jnp.logaddexp(self.lse, other.lse)
        # Where neither sees anything, both are -inf.
        some = jnp.where(lse == -jnp.inf, 0.0, lse)
        weights = [jnp.exp(part.lse - some)[..., None] for part in (self, other)]
        return Partial(self.out * weights[0] + other.out * weights[1], lse)


def attend(
    ops: Any, options: Any, attention: Callable[..., tuple[jax.Array, jax.Array]]
) -> tuple[jax.Array, jax.Array]:
    """The operator on the reference's flat operands.

    The first rows of a sequence, which all of its queries see, need no mask. Of the others, the
    rows that its queries see differently, there are S where the queries are consecutive.

    Args:
      ops: the reference's flat operands.
      options: the primitive's options.
      attention: `_compat.cudnn_attention`, or what computes the same.

    Returns:
      out [B, S, Nq, D] float32 and lse [B, S, Nq] float32, without the sinks.
    """
    rows = _Rows(ops)
    queries = ops.q.shape[1]
    positions = ops.positions
    sees = positions >= 0
    # Of the queries that see something, [B]:
    first = jnp.where(sees, positions, jnp.iinfo(jnp.int32).max - 1).min(axis=1)
    last = jnp.minimum(positions, rows.capacity - 1).max(axis=1)
    if options.window:
        shared = jnp.zeros_like(first)
        begin = jnp.clip(first - (options.window - 1), 0, rows.capacity)
    else:
        shared = jnp.where(last >= 0, jnp.minimum(first + 1, rows.there()), 0)
        begin = shared

    def call(k: jax.Array, v: jax.Array, seen: jax.Array, **keywords: Any) -> Partial:
        """`seen` [B, S or 1]: whether a query sees any of these rows."""
        out, lse = attention(ops.q, k, v, scale=options.scale, **keywords)
        seen = seen[:, :, None]
        out = jnp.where(seen[..., None], out.astype(jnp.float32), 0.0)
        return Partial(out, jnp.where(seen, lse, -jnp.inf))

    def unmasked(step: jax.Array, size: int) -> Partial:
        numbers = jnp.broadcast_to(
            step * size + jnp.arange(size, dtype=jnp.int32), (len(first), size)
        )
        lengths = jnp.clip(shared - step * size, 0, size)
        return call(*rows.read(numbers), (lengths > 0)[:, None] & sees, kv_lengths=lengths)

    def masked(step: jax.Array, size: int) -> Partial:
        numbers = (begin + step * size)[:, None] + jnp.arange(size, dtype=jnp.int32)
        seen = rows.exist(numbers)[:, None, :] & (numbers[:, None, :] <= positions[:, :, None])
        if options.window:
            seen = seen & (positions[:, :, None] - numbers[:, None, :] < options.window)
        return call(*rows.read(numbers), seen.any(axis=2), mask=seen[:, None])

    size = min(-(-queries // _MULTIPLE) * _MULTIPLE, _MASKED_ROWS)
    steps = jnp.where(last >= 0, -(-(last + 1 - begin) // size), 0).max(initial=0)
    total = masked(jnp.int32(0), size)
    total = lax.fori_loop(1, steps, lambda i, old: old.merged(masked(i, size)), total)
    if not options.window:
        size = rows.most_together()
        if rows.capacity <= size:
            total = total.merged(unmasked(jnp.int32(0), size))
        else:
            steps = -(-shared.max(initial=0) // size)
            total = lax.fori_loop(0, steps, lambda i, old: old.merged(unmasked(i, size)), total)
    if ops.sinks is None:
        return total
    one = jnp.ones_like(total.lse)
    return normalise(total.out, one, total.lse, ops.sinks[:, None, :]), total.lse


class _Rows:
    """The rows of the cache that each sequence has."""

    def __init__(self, ops: Any):
        self._ops = ops
        self._block_rows, self._kv_heads, self._head_dim = ops.k_cache.shape[-3:]
        self.capacity = ops.exists.shape[1] * self._block_rows

    def most_together(self) -> int:
        """How many rows of each sequence may be read together: a multiple of 128."""
        batch = len(self._ops.exists)
        per_row = 2 * 2 * batch * self._kv_heads * self._head_dim
        fit = max(_BUDGET // per_row // _MULTIPLE, 1)
        return min(fit, -(-self.capacity // _MULTIPLE)) * _MULTIPLE

    def there(self) -> jax.Array:
        """How many rows there are before the first one whose block is missing: [B]."""
        missing = ~self._ops.exists
        blocks = jnp.where(missing.any(axis=1), missing.argmax(axis=1), missing.shape[1])
        return blocks.astype(jnp.int32) * self._block_rows

    def exist(self, numbers: jax.Array) -> jax.Array:
        """Whether rows [B, c] are there."""
        block = numbers // self._block_rows
        return jnp.take_along_axis(self._ops.exists, block, axis=1, mode="fill", fill_value=False)

    def read(self, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Rows [B, c] of K and of V, dequantised: [B, c, Nkv, D] in q's dtype."""
        ops = self._ops
        block = numbers // self._block_rows
        place = tuple(jnp.take_along_axis(n, block, axis=1, mode="clip") for n in ops.blocks)
        place += (numbers % self._block_rows,)

        def values(codes: jax.Array, scale: jax.Array, offset: jax.Array | None) -> jax.Array:
            rows = codes.at[place].get(mode="clip").astype(jnp.float32)
            if offset is not None:
                rows = rows - offset[:, None]
            return (rows * scale[:, None]).astype(ops.q.dtype)

        return (
            values(ops.k_cache, ops.scale_k, ops.offset_k),
            values(ops.v_cache, ops.scale_v, ops.offset_v),
        )
