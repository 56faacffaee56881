"""Tables of the rotary position embedding, in the shape that the operator takes."""

import functools
import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_kvcache.ops.slots import INT32_MAX
from jax_kvcache.rope_parameters import RopeParameters, read_rope_parameters

# floor(2**192 / (2 * pi)), from the decimal expansion of pi.
_PI = 31415926535897932384626433832795028841971693993751058209749445923078164
_INVERSE_TWO_PI = (10**70 << 192) // (2 * _PI)
_RADIANS_PER_UNIT = 2 * math.pi / 2**32  # a phase of 2**32 units is a whole turn


def rope_tables(
    positions: ArrayLike,
    head_dim: int,
    theta: float | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    rope_parameters: Mapping[str, Any] | RopeParameters | None = None,
    seq_len: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the cosine and sine tables of rotate-half RoPE for the given positions.

    Element j and element j + D/2 of a head turn by the angle `position * inv_freq[j]`, with
    `inv_freq[j] = theta ** (-2 * j / D)` unless `rope_parameters` says otherwise. The angle is
    taken modulo a whole turn in 64-bit fixed point, so it is as exact at position 2**31 - 1 as it
    is at position 1; cos and sin are computed in float32, and the results are rounded to `dtype`.

    With a `partial_rotary_factor`, r < D dimensions turn. The tables then have cos = 1 and sin = 0
    where nothing turns, in the order that `permute_for_rope` gives the columns.

    Args:
      positions: [B, S] integers, the position of each token in its sequence.
      head_dim: D, the even size of one head.
      theta: the base of the frequencies; above 0; None is the one that `rope_parameters` has, or
        else 10000.
      dtype: float16, bfloat16 or float32.
      rope_parameters: the dict of that name in a model's config.json (`rope_scaling` in older
        files), of the type default, linear, llama3, yarn, dynamic or longrope. The last two may
        need `max_position_embeddings`, which stands beside it in config.json, as one more key.
      seq_len: the longest sequence that will be read; required for the types dynamic and longrope,
        whose frequencies depend on it, and without effect for the others. Static.

    Returns:
      cos and sin, each [B, S, 1, D] in `dtype`.

    Raises:
      TypeError: `positions`, `dtype` or `seq_len` has a dtype or a rank that is not listed above,
        or a value of `rope_parameters` has the wrong type.
      ValueError: `head_dim` is not an even number above 0, `theta` is not above 0 or is given
        beside a `rope_theta`, `rope_parameters` is not of a known type or lacks what its type
        needs, or `seq_len` is missing.
    """
    positions = _check_positions(positions)
    if not isinstance(head_dim, int | np.integer) or head_dim <= 0 or head_dim % 2:
        raise ValueError(f"`head_dim` must be even and above 0, got {head_dim}.")
    if theta is not None and (
        not isinstance(theta, int | float | np.number) or not 0 < theta <= sys.float_info.max
    ):
        raise ValueError(f"`theta` must be a finite number above 0, got {theta!r}.")
    if jnp.dtype(dtype) not in (jnp.float16, jnp.bfloat16, jnp.float32):
        raise TypeError(
            f"`dtype` must be float16, bfloat16 or float32, got {jnp.dtype(dtype).name}."
        )
    parameters = read_rope_parameters(rope_parameters, theta)
    frequencies, factor = parameters.frequencies(int(head_dim), seq_len)
    return _tables(
        positions,
        frequencies=tuple(frequencies.tolist()),
        factor=factor,
        half=int(head_dim) // 2,
        dtype=jnp.dtype(dtype),
    )


def _check_positions(positions: ArrayLike) -> ArrayLike:
    """Raises unless `positions` is [B, S] integers that fit into int32."""
    if not isinstance(positions, jax.Array):
        positions = np.asarray(positions)
        if positions.dtype.kind in "iu" and positions.size:
            if positions.max() > INT32_MAX or positions.min() < -INT32_MAX - 1:
                worst = max(int(positions.max()), int(positions.min()), key=abs)
                raise ValueError(f"`positions` must fit into int32, got {worst}.")
            positions = positions.astype(np.int32)
    if positions.ndim != 2 or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(
            "`positions` must be integers of shape [B, S], "
            f"got {positions.dtype} of shape {list(positions.shape)}."
        )
    return positions


@functools.partial(jax.jit, static_argnames=("frequencies", "factor", "half", "dtype"))
def _tables(
    positions: ArrayLike,
    *,
    frequencies: tuple[float, ...],
    factor: float,
    half: int,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """The tables, where the first r/2 = len(frequencies) of D/2 = `half` pairs turn."""
    cos, sin = _cos_and_sin(positions, frequencies)  # [B, S, r/2]
    if factor != 1:
        cos, sin = cos * jnp.float32(factor), sin * jnp.float32(factor)
    still = ((0, 0), (0, 0), (0, half - len(frequencies)))

    def table(turning: jax.Array, constant: float) -> jax.Array:
        padded = jnp.pad(turning, still, constant_values=constant)
        return jnp.concatenate([padded, padded], axis=-1)[:, :, None, :].astype(dtype)

    return table(cos, 1.0), table(sin, 0.0)


def _cos_and_sin(
    positions: ArrayLike, frequencies: tuple[float, ...]
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position * frequency, [B, S, r/2] float32.

    The product is made modulo a whole turn with 32-bit integers alone, which wrap around exactly on
    every platform. (In float32 the product of position 2**24 and frequency 1 is off by a radian,
    and what XLA fuses or reorders would break a product of split floats.)
    """
    words = _turns_per_position(frequencies)
    high, low = (jnp.asarray(word)[None, None, :] for word in words)
    positions = jnp.asarray(positions)[:, :, None]
    if not jnp.issubdtype(positions.dtype, jnp.unsignedinteger):
        positions = positions.astype(jnp.int32)
    position = jnp.abs(positions).astype(jnp.uint32)
    fraction, carried = position * low, _high_word(position, low)
    phase = position * high + carried  # whole: 2**32 units; `fraction` is 2**-32 of a unit
    quarter = (phase + jnp.uint32(2**29)) >> 30  # the nearest quarter turn, 0 .. 3, or 4 for 0
    rest = jax.lax.bitcast_convert_type(phase - (quarter << 30), jnp.int32)  # within an eighth turn
    units = rest.astype(jnp.float32) + fraction.astype(jnp.float32) * jnp.float32(2**-32)
    angle = units * jnp.float32(_RADIANS_PER_UNIT)
    c, s = jnp.cos(angle), jnp.sin(angle)
    odd = (quarter & 1) == 1
    cos, sin = jnp.where(odd, s, c), jnp.where(odd, c, s)
    cos = jnp.where(((quarter + 1) & 2) == 2, -cos, cos)
    sin = jnp.where(((quarter & 2) == 2) != (positions < 0), -sin, sin)
    return cos, sin


def _turns_per_position(frequencies: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Each frequency / (2 pi) modulo 1, in units of 2**-64, as its two 32-bit words."""
    words = []
    for frequency in frequencies:
        numerator, denominator = frequency.as_integer_ratio()
        turns = ((numerator * _INVERSE_TWO_PI // denominator >> 127) + 1) >> 1  # to nearest
        words.append(divmod(turns % 2**64, 2**32))
    high, low = np.array(words, np.uint32).reshape(-1, 2).T
    return high, low


def _high_word(a: jax.Array, b: jax.Array) -> jax.Array:
    """The high 32 bits of the 64-bit product of two uint32, from products of 16-bit halves."""
    a0, a1, b0, b1 = a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16
    middle = a1 * b0 + ((a0 * b0) >> 16)
    other = a0 * b1 + (middle & 0xFFFF)
    return a1 * b1 + (middle >> 16) + (other >> 16)


class RopePermutation(NamedTuple):
    """What `permute_for_rope` returns.

    Attributes:
      order: [D] int, the old column of a head that each new column is.
      arrays: the permuted arrays.
    """

    order: np.ndarray
    arrays: Any


def permute_for_rope(
    arrays: Any,
    head_dim: int,
    *,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    axis: int = -1,
) -> RopePermutation:
    """Reorders each head's columns so that the operator's rotation by halves is the model's own.

    The operator turns column j with column j + D/2. A model that turns other pairs gives the same
    scores after one permutation of the columns that make q and k: of the projection's weights, and
    of all that belongs to its columns (weight scale, bias, the norm of each head, K's cache scale
    and offset). V and its parameters stay as they are. Every output is the same product and sum
    as in the direct rotation, so it is equal to the bit, in the new order.

    Args:
      arrays: a pytree of NumPy or JAX arrays, or None; `axis` of each holds whole heads, in the
        model's order.
      head_dim: D, the even size of one head.
      rotary_dim: r, how many leading columns of a head turn, even; None is D. The rest passes
        through, and its tables have cos = 1 and sin = 0, as `rope_tables` makes them for a
        `partial_rotary_factor` of r / D.
      interleaved: whether the pairs are (2j, 2j + 1), as in GPT-J and Meta's own Llama files,
        instead of (j, j + r/2).
      axis: the dimension of the columns; -2 for weights [out, in].

    Returns:
      The order, and the permuted arrays.

    Raises:
      ValueError: `head_dim` or `rotary_dim` is not even or not in its range, or the `axis` of an
        array is not a multiple of `head_dim`.
    """
    if not isinstance(head_dim, int | np.integer) or head_dim <= 0 or head_dim % 2:
        raise ValueError(f"`head_dim` must be even and above 0, got {head_dim}.")
    turning = head_dim if rotary_dim is None else rotary_dim
    if not isinstance(turning, int | np.integer) or not 0 < turning <= head_dim or turning % 2:
        raise ValueError(
            f"`rotary_dim` must be even and in (0, `head_dim` = {head_dim}], got {rotary_dim}."
        )
    own, passed = np.arange(head_dim), np.arange(turning, head_dim)
    if interleaved:
        first, second = own[0:turning:2], own[1:turning:2]
    else:
        first, second = own[: turning // 2], own[turning // 2 : turning]
    half = len(passed) // 2
    order = np.concatenate([first, passed[:half], second, passed[half:]])

    def permute(array):
        width = array.shape[axis]
        if width % head_dim:
            raise ValueError(
                f"`arrays` must have whole heads along axis {axis}, a multiple of `head_dim` = "
                f"{head_dim}, got {width} in shape {list(array.shape)}."
            )
        columns = (np.arange(0, width, head_dim)[:, None] + order).reshape(-1)
        if isinstance(array, jax.Array):
            return jnp.take(array, jnp.asarray(columns), axis=axis)
        return np.take(array, columns, axis=axis)

    return RopePermutation(order, jax.tree.map(permute, arrays))
