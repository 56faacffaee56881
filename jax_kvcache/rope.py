"""Tables of the rotary position embedding, in the shape that the operator takes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_kvcache.ops.slots import INT32_MAX


def rope_tables(
    positions: ArrayLike,
    head_dim: int,
    theta: float = 10000.0,
    dtype: DTypeLike = jnp.bfloat16,
) -> tuple[jax.Array, jax.Array]:
    """Computes the cosine and sine tables of rotate-half RoPE for the given positions.

    Element j and element j + D/2 of a head turn by the angle `position * theta ** (-2 * j / D)`.
    The angles are computed in float32 and only the results are rounded to `dtype`.

    Args:
      positions: [B, S] integers, the position of each token in its sequence.
      head_dim: D, the even size of one head.
      theta: the base of the frequencies; above 0.
      dtype: float16, bfloat16 or float32.

    Returns:
      cos and sin, each [B, S, 1, D] in `dtype`.

    Raises:
      TypeError: `positions` or `dtype` has a dtype or a rank that is not listed above.
      ValueError: `head_dim` is not an even number above 0, or `theta` is not above 0.
    """
    if not isinstance(positions, jax.Array):
        positions = np.asarray(positions)
        if positions.dtype.kind in "iu" and positions.size:
            if positions.max() > INT32_MAX or positions.min() < -INT32_MAX:
                raise ValueError(f"`positions` must fit into int32, got {positions.max()}.")
            positions = positions.astype(np.int32)
    if positions.ndim != 2 or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(
            "`positions` must be integers of shape [B, S], "
            f"got {positions.dtype} of shape {list(positions.shape)}."
        )
    if not isinstance(head_dim, int | np.integer) or head_dim <= 0 or head_dim % 2:
        raise ValueError(f"`head_dim` must be even and above 0, got {head_dim}.")
    if not isinstance(theta, int | float | np.number) or not 0 < theta < math.inf:
        raise ValueError(f"`theta` must be a finite number above 0, got {theta!r}.")
    if jnp.dtype(dtype) not in (jnp.float16, jnp.bfloat16, jnp.float32):
        raise TypeError(
            f"`dtype` must be float16, bfloat16 or float32, got {jnp.dtype(dtype).name}."
        )
    exponents = np.arange(head_dim // 2) / (head_dim // 2)
    frequencies = np.asarray(float(theta) ** -exponents, np.float32)  # [D/2]
    angles = positions.astype(jnp.float32)[:, :, None, None] * jnp.asarray(
        np.concatenate([frequencies, frequencies])[None, None, None, :]
    )
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)
