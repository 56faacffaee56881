"""A float KV cache, for models without cache scales and to compare the int8 cache with."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_kvcache.model.linear import Projected
from jax_kvcache.ops.dequant_rope_quant_kvcache.api import dequant_rope_quant_kvcache
from jax_kvcache.ops.implementation import Implementation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FloatCache:
    """A contiguous float KV cache with layers: no quantisation, four times the bytes.

    Attributes:
      k: [L, B, C2, Nkv, D], after RoPE.
      v: as k.
    """

    k: jax.Array
    v: jax.Array

    @classmethod
    def create(cls, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Self:
        """An empty cache (all zeros) of the shape [L, B, C2, Nkv, D]."""
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of k and v together."""
        return self.k.nbytes + self.v.nbytes

    def update(self, k: jax.Array, v: jax.Array, positions: jax.Array, layer: int) -> Self:
        """Writes S tokens of each text into one layer.

        Args:
          k: [B, S, Nkv, D].
          v: as k.
          positions: [B] int32, the row of each text's first token; negative skips the text, and
            tokens past the last row are dropped.
          layer: the layer.
        """
        batch, steps = k.shape[:2]
        rows = positions[:, None] + jnp.arange(steps, dtype=jnp.int32)[None, :]
        rows = jnp.where(positions[:, None] >= 0, rows, self.k.shape[2])  # past the end: dropped
        texts = jnp.arange(batch, dtype=jnp.int32)[:, None]

        def write(cache: jax.Array, values: jax.Array) -> jax.Array:
            return cache.at[layer, texts, rows].set(values.astype(cache.dtype), mode="drop")

        return dataclasses.replace(self, k=write(self.k, k), v=write(self.v, v))


def rotate(
    projected: Projected,
    cos: jax.Array,
    sin: jax.Array,
    num_kv_heads: int,
    head_dim: int,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [B, S, Nq, D], k and v [B, S, Nkv, D], by the operator, which writes nothing."""
    batch = projected.x.shape[0]
    unused = jnp.ones((num_kv_heads, head_dim), jnp.float32)
    shape = (batch, 1, num_kv_heads, head_dim)
    q, k, v, *_ = dequant_rope_quant_kvcache(
        projected.x,
        cos,
        sin,
        jnp.zeros(shape, jnp.int8),
        jnp.zeros(shape, jnp.int8),
        jnp.full((batch,), -1, jnp.int32),  # negative indices write nothing
        unused,
        unused,
        weight_scale=projected.weight_scale,
        activation_scale=projected.activation_scale,
        bias=projected.bias,
        kv_output=True,
        implementation=implementation,
    )
    assert k is not None
    assert v is not None
    return q, k, v


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, window: int | None
) -> jax.Array:
    """softmax(D**-0.5 * q @ k.T) @ v in float32, over float k and v.

    Args:
      q: [B, S, Nq, D].
      k: [B, C, Nkv, D].
      v: as k.
      positions: [B] int32, the row of the first of the S tokens; query s sees rows up to
        positions + s.
      window: how many of those rows, the last ones, are seen; None for all.

    Returns:
      [B, S, Nq, D] float32.
    """
    batch, steps, q_heads, head_dim = q.shape
    last = positions[:, None, None] + jnp.arange(steps, dtype=jnp.int32)[None, :, None]
    rows = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None, :]
    seen = rows <= last  # [B, S, C]
    if window is not None:
        seen = seen & (rows > last - window)
    grouped = q.astype(jnp.float32).reshape(batch, steps, k.shape[2], -1, head_dim)
    scores = jnp.einsum("bsngd,bcnd->bngsc", grouped, k.astype(jnp.float32), precision="highest")
    scores = jnp.where(seen[:, None, None], scores * head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("bngsc,bcnd->bsngd", weights, v.astype(jnp.float32), precision="highest")
    return out.reshape(batch, steps, q_heads, head_dim)
