"""Partial results of a prefill by cuDNN, and the order of the queries that they are for."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


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

    def moved(self, by: jax.Array) -> "Partial":
        """Query s's results as those of query s + by [B]; the first queries see nothing."""
        order = jnp.arange(self.lse.shape[1], dtype=jnp.int32) - by[:, None]
        at = jnp.maximum(order, 0)[..., None]
        lse = jnp.take_along_axis(self.lse, at, axis=1, mode="clip")
        out = jnp.take_along_axis(self.out, at[..., None], axis=1, mode="clip")
        return Partial(out, jnp.where(order[..., None] >= 0, lse, -jnp.inf))


def first_query_first(ops: Any) -> tuple[Any, jax.Array]:
    """Queries moved so that the first one of a sequence that sees a row is query 0.

    Returns:
      The operands, and by how many queries they were moved, [B].
    """
    early = (ops.positions >= 0).argmax(axis=1).astype(jnp.int32)
    queries = ops.q.shape[1]
    order = early[:, None] + jnp.arange(queries, dtype=jnp.int32)
    at = jnp.minimum(order, queries - 1)
    q = jnp.take_along_axis(ops.q, at[..., None, None], axis=1, mode="clip")
    positions = jnp.take_along_axis(ops.positions, at, axis=1, mode="clip")
    return ops._replace(q=q, positions=jnp.where(order < queries, positions, -1)), early
