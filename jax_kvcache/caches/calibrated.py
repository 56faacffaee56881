"""Scales of a cache from its first prompt, and the codes that they give."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jax_kvcache.export import register_namedtuple_serialization
from jax_kvcache.ops.checks import FLOATS, check_array, check_int32, check_shape
from jax_kvcache.ops.dequant_rope_quant_kvcache.reference import quantize_int8
from jax_kvcache.ops.explicit import automatically, spec_of

MARGIN = 2.0
_SMALLEST_SHARE = 0.5  # of the head's mean amplitude: what a quiet channel is made ready for


@register_namedtuple_serialization
class CalibrationCost(NamedTuple):
    """What the codes of a calibrated cache lose of its prompt: float32 scalars, or [L].

    An infinite value counts as clipped. NaN does not, and its code is 0; a prompt, or a layer of
    it, with a value that is not finite has the error NaN. Padding does not count.

    Attributes:
      clipped_k: share of K's values beyond the first or the last code.
      clipped_v: as clipped_k, of V.
      error_k: root mean square error of K, as a share of its root mean square.
      error_v: as error_k, of V.
    """

    clipped_k: jax.Array
    clipped_v: jax.Array
    error_k: jax.Array
    error_v: jax.Array


class CalibratedFields(NamedTuple):
    """The codes of a prompt, [*L, B, S, Nkv, D] int8, their scales [*L, Nkv, D], and the cost."""

    k: jax.Array
    v: jax.Array
    scale_k: jax.Array
    scale_v: jax.Array
    cost: CalibrationCost


def calibrate_prompt(
    k: jax.Array, v: jax.Array, lengths: ArrayLike | None, margin: float
) -> CalibratedFields:
    """Scales from a prompt's K and V; see `KVCache.calibrated`."""
    for name, value in (("k", k), ("v", v)):
        check_array(name, value, FLOATS, (4, 5))
    letters = "B, S, Nkv, D" if k.ndim == 4 else "L, B, S, Nkv, D"
    check_shape("v", v, (letters, k.shape))
    if k.shape[-1] % 2:
        raise ValueError(f"`k` must have an even head size D, got {k.shape[-1]}.")
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 < margin < 2**20:
        raise ValueError(f"`margin` must be a number in (0, 2**20), got {margin!r}.")
    batch, steps = k.shape[-4:-2]
    if 0 in k.shape:
        raise ValueError(
            f"`k` must have tokens and channels, got shape [{letters}] = {list(k.shape)}."
        )
    is_read = jnp.ones((batch, steps), bool)
    if lengths is not None:
        lengths = check_int32("lengths", lengths, "B", (batch,))
        is_read = jnp.arange(steps, dtype=jnp.int32)[None, :] < lengths[:, None]
    specs: list[Any] = [spec_of(k), spec_of(v)]
    specs += [PartitionSpec(*spec[:-4], *spec[-2:]) for spec in specs]
    per_layer: list[Any] = [PartitionSpec(*specs[0][:-4])] * 4
    out = CalibratedFields(*[*specs, CalibrationCost(*per_layer)])
    return automatically(functools.partial(_fields, margin=margin), out, k, v, is_read)


# In a program of its own: `quantize_int8` has a NaN that no result has, and debug_nans finds it.
@functools.partial(jax.jit, static_argnames="margin")
def _fields(k: jax.Array, v: jax.Array, is_read: jax.Array, margin: float) -> CalibratedFields:
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    scale_k = _scale(_turning_amplitude(k), is_read, margin)
    scale_v = _scale(jnp.abs(v), is_read, margin)
    codes_k, clipped_k, error_k = _quantize(k, scale_k, is_read)
    codes_v, clipped_v, error_v = _quantize(v, scale_v, is_read)
    cost = CalibrationCost(clipped_k, clipped_v, error_k, error_v)
    return CalibratedFields(codes_k, codes_v, scale_k, scale_v, cost)


def _turning_amplitude(k: jax.Array) -> jax.Array:
    """The largest value that each channel of K can have while RoPE turns its pair.

    A slow pair turns little within a prompt: what one channel has now, the other has later.
    """
    first, second = jnp.split(k, 2, axis=-1)
    amplitude = jnp.sqrt(first * first + second * second)
    return jnp.concatenate([amplitude, amplitude], axis=-1)


def _tokens(is_read: jax.Array, values: jax.Array) -> jax.Array:
    """[B, S] as a mask of values [*L, B, S, Nkv, D]."""
    mask = is_read[:, :, None, None]
    return jnp.broadcast_to(jnp.expand_dims(mask, range(values.ndim - 4)), values.shape)


def _scale(amplitudes: jax.Array, is_read: jax.Array, margin: float) -> jax.Array:
    """[*L, Nkv, D]: `margin` times the largest amplitude has the last code."""
    usable = _tokens(is_read, amplitudes) & jnp.isfinite(amplitudes)
    largest = jnp.max(jnp.where(usable, amplitudes, 0.0), axis=(-4, -3))
    typical = jnp.mean(largest, axis=-1, keepdims=True)
    scale = jnp.maximum(largest, _SMALLEST_SHARE * typical) * jnp.float32(margin / 127)
    normal = (scale >= jnp.finfo(jnp.float32).tiny) & jnp.isfinite(scale)
    return jnp.where(normal, scale, jnp.ones_like(scale))


def _quantize(
    values: jax.Array, scale: jax.Array, is_read: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The operator's codes, 0 for padding; the share that was clipped, and the relative error."""
    read = _tokens(is_read, values)
    values = jnp.where(read, values, 0.0)
    codes = quantize_int8(values, jnp.expand_dims(scale, -3), None)
    steps = jnp.expand_dims(scale, (-4, -3))
    noise = codes.astype(jnp.float32) * steps - values
    beyond = jnp.abs(values) > 127.5 * steps
    largest = jnp.max(jnp.abs(values), axis=(-4, -3, -2, -1), keepdims=True)
    unit = jnp.where(largest == 0, 1.0, largest)  # float32 holds the squares of numbers near 1

    def total(array: jax.Array) -> jax.Array:
        return jnp.sum(array.astype(jnp.float32), axis=(-4, -3, -2, -1))

    share = total(beyond) / jnp.maximum(total(read), 1.0)
    power = jnp.maximum(total((values / unit) ** 2), 1.0)  # only that of zeros is below 1
    return codes, share, jnp.sqrt(total((noise / unit) ** 2) / power)


def row_padding(rank: int, rows: int) -> list[tuple[int, int]]:
    """What `jnp.pad` takes to add rows at the end of [*L, B, S, Nkv, D]."""
    return [(0, rows if dim == rank - 3 else 0) for dim in range(rank)]
