"""What other number formats make of the same values: each format quantises and dequantises."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_kvcache.numerics.calibration import Calibration, fake_quantize


def int8_per_channel(values: jax.Array, calibration: Calibration) -> jax.Array:
    """The operator's format: a static scale per channel, and an offset if there is one."""
    return fake_quantize(values, *calibration).values


def int8_per_tensor(values: jax.Array, calibration: Calibration) -> jax.Array:
    """One static scale for all channels: the largest of theirs."""
    scale = calibration.scale
    return fake_quantize(values, jnp.full_like(scale, jnp.max(scale))).values


def int8_per_token(values: jax.Array, calibration: Calibration) -> jax.Array:
    """One scale per token and head, the token's own absolute maximum / 127, stored beside it."""
    del calibration
    values = values.astype(jnp.float32)
    step = jnp.max(jnp.abs(values), axis=-1, keepdims=True) / 127
    step = jnp.where(step >= jnp.finfo(jnp.float32).tiny, step, jnp.ones_like(step))
    return jnp.clip(jnp.round(values / step), -128, 127) * step


def int4_per_channel(values: jax.Array, calibration: Calibration) -> jax.Array:
    """As `int8_per_channel` without offset, with codes -8 .. 7 over the same range."""
    scale = calibration.scale
    step = (scale * (127 / 7)).reshape(*(1,) * (values.ndim - scale.ndim), *scale.shape)
    return jnp.clip(jnp.round(values.astype(jnp.float32) / step), -8, 7) * step


def _float8(values: jax.Array, calibration: Calibration, *, dtype: DTypeLike) -> jax.Array:
    """A cast, clamped first: beyond the largest number the conversion gives NaN or infinity."""
    del calibration
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(values.astype(jnp.float32), -largest, largest).astype(dtype).astype(jnp.float32)


float8_e4m3 = functools.partial(_float8, dtype=jnp.float8_e4m3fn)
float8_e5m2 = functools.partial(_float8, dtype=jnp.float8_e5m2)

# Each maps values [..., Nkv, D] and the channels' int8 `Calibration` [Nkv, D] to what a reader of
# the cache gets back, float32 [..., Nkv, D].
FORMATS: dict[str, Callable[[jax.Array, Calibration], jax.Array]] = {
    "int8 per channel": int8_per_channel,
    "int8 per tensor": int8_per_tensor,
    "int8 per token": int8_per_token,
    "float8 e4m3": float8_e4m3,
    "float8 e5m2": float8_e5m2,
    "int4 per channel": int4_per_channel,
}
