"""The running softmax of the reference, which takes in rows and joins others, in float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# What a score is that no query may see: finite, so that it subtracts from itself.
UNSEEN = float(np.finfo(np.float32).min)


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product in float32 on every platform; XLA's default on a GPU or a TPU is less."""
    return jnp.einsum(spec, a, b, precision=lax.Precision.HIGHEST)


class Softmax(NamedTuple):
    """A running softmax: [B, Nkv, G, S], sums with [D] more; `seen` is [B, 1, 1, S]."""

    seen: jax.Array
    peak: jax.Array
    total: jax.Array
    sums: jax.Array

    @classmethod
    def of_nothing(cls, positions: jax.Array, like: jax.Array) -> "Softmax":
        """Without rows: positions [B, S], and an array like the sums.

        Zeros of the operands' own type, so that a loop's carry varies over the mesh axes they do.
        """
        sums = jnp.zeros_like(like)
        return cls(
            jnp.zeros_like(positions, bool)[:, None, None],
            jnp.full_like(sums[..., 0], UNSEEN),
            jnp.zeros_like(sums[..., 0]),
            sums,
        )

    def merged(self, other: "Softmax") -> "Softmax":
        """The softmax over the rows of both."""
        peak = jnp.maximum(self.peak, other.peak)
        kept, its = jnp.exp(self.peak - peak), jnp.exp(other.peak - peak)
        return Softmax(
            self.seen | other.seen,
            peak,
            self.total * kept + other.total * its,
            self.sums * kept[..., None] + other.sums * its[..., None],
        )

    def add(self, seen: jax.Array, scores: jax.Array, values: jax.Array) -> "Softmax":
        """Adds rows: seen [B, 1, 1, S, c], scores [B, Nkv, G, S, c], values [B, c, Nkv, D]."""
        scores = jnp.where(seen, scores, UNSEEN)
        peak = jnp.maximum(self.peak, scores.max(axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - peak[..., None]), 0.0)
        kept = jnp.exp(self.peak - peak)
        return Softmax(
            self.seen | seen.any(axis=-1),
            peak,
            self.total * kept + weights.sum(axis=-1),
            self.sums * kept[..., None] + product("bngsc,bcnd->bngsd", weights, values),
        )
