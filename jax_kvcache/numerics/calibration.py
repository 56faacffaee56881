"""From observers to the operator's scales and offsets, and the quantiser that uses them."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from jax_kvcache.export import register_namedtuple_serialization
from jax_kvcache.numerics.observers import MinMax, Sketch, check_channels
from jax_kvcache.ops.checks import check_choice, check_shape
from jax_kvcache.ops.dequant_rope_quant_kvcache.reference import quantize_int8
from jax_kvcache.ops.explicit import automatically, spec_of
from jax_kvcache.ops.indexing import take_one

Method = Literal["absmax", "minmax", "percentile", "mse"]
Key = TypeVar("Key")
METHODS: tuple[Method, ...] = get_args(Method)

# With scale >= max|value| * 2**-15, |value / scale + offset| stays below 2**16, where float32
# still resolves 1/128 of a code.
_SMALLEST_STEP = 2.0**-15
_POINTS_PER_BUCKET = 4


@register_namedtuple_serialization
class Calibration(NamedTuple):
    """Parameters of the operator for one cache: z = value / scale + offset, code = rint(z).

    Attributes:
      scale: [*channels] float32, a normal number above 0.
      offset: [*channels] float32 in codes, or None for a symmetric calibration.
    """

    scale: jax.Array
    offset: jax.Array | None


@register_namedtuple_serialization
class FakeQuantized(NamedTuple):
    """What `fake_quantize` returns.

    Attributes:
      codes: int8, what the operator writes into the cache.
      values: float32, what a reader of the cache gets back.
    """

    codes: jax.Array
    values: jax.Array


def fake_quantize(
    values: jax.Array, scale: jax.Array, offset: jax.Array | None = None
) -> FakeQuantized:
    """Quantises and dequantises: codes as the operator's to the bit, and (code - offset) * scale.

    Args:
      values: [..., *channels] float16, bfloat16 or float32.
      scale: [*channels] float32.
      offset: [*channels] float32 in codes, or None.

    Returns:
      codes and values, both of the shape of `values`.

    Raises:
      ValueError: `values` or `offset` does not have the channels of `scale`.
    """
    check_channels(values, scale.shape)
    if offset is not None:
        check_shape("offset", offset, ("*channels", scale.shape))
    spec: Any = spec_of(values)
    return automatically(_fake_quantize, FakeQuantized(spec, spec), values, scale, offset)


def _fake_quantize(values: jax.Array, scale: jax.Array, offset: jax.Array | None) -> FakeQuantized:
    rows = values.reshape(-1, 1, scale.size)  # [T, Nkv, D] for the operator's stage
    flat_scale = scale.reshape(1, -1)
    flat_offset = None if offset is None else offset.reshape(1, -1)
    codes = _codes(rows, flat_scale, flat_offset).reshape(values.shape)
    steps = codes.astype(jnp.float32)
    ones = (1,) * (values.ndim - scale.ndim)
    if offset is not None:
        steps = steps - offset.reshape(*ones, *offset.shape)
    return FakeQuantized(codes, steps * scale.reshape(*ones, *scale.shape))


def scale_and_offset(
    low: jax.Array,
    high: jax.Array,
    *,
    symmetric: bool = True,
    codes: tuple[int, int] = (-128, 127),
) -> Calibration:
    """Parameters that cover [low, high].

    Symmetric: scale = max(|low|, |high|) / codes[1]. Asymmetric: `low` gets the first code and
    `high` the last one; the step is at least max(|low|, |high|) * 2**-15, so that a constant
    channel keeps its value and float32 keeps z. A channel whose scale would be zero, subnormal or
    not finite (all zeros, or never observed) gets scale 1 and offset 0.

    Args:
      low: [*channels] float32.
      high: [*channels] float32.
      symmetric: whether zero is code zero and there is no offset.
      codes: the first and the last code.
    """
    magnitude = jnp.maximum(-low, high)
    if symmetric:
        scale = magnitude / codes[1]
    else:
        steps = codes[1] - codes[0]
        magnitude = jnp.maximum(jnp.abs(low), jnp.abs(high))
        scale = jnp.maximum(high / steps - low / steps, magnitude * _SMALLEST_STEP)
    usable = (scale >= jnp.finfo(jnp.float32).tiny) & jnp.isfinite(scale)
    scale = jnp.where(usable, scale, jnp.ones_like(scale))
    if symmetric:
        return Calibration(scale, None)
    offset = jnp.where(usable, codes[0] - low / scale, jnp.zeros_like(scale))
    return Calibration(scale, offset)


# The operator's codes. Compiled, since what keeps them exact has a NaN in it, which reaches no code
# but at which `jax.debug_nans` would stop.
_codes = jax.jit(quantize_int8)


@overload
def calibrate(
    observer: MinMax | Sketch,
    *,
    method: Method = ...,
    symmetric: bool = ...,
    percentile: float = ...,
    ratios: npt.ArrayLike | None = ...,
) -> Calibration: ...


@overload
def calibrate(
    observer: Mapping[Key, MinMax | Sketch],
    *,
    method: Method = ...,
    symmetric: bool = ...,
    percentile: float = ...,
    ratios: npt.ArrayLike | None = ...,
) -> dict[Key, Calibration]: ...


def calibrate(
    observer: Any,
    *,
    method: Method = "absmax",
    symmetric: bool = True,
    percentile: float = 99.99,
    ratios: npt.ArrayLike | None = None,
) -> Any:
    """Scale and offset of each channel from what an observer has seen.

    Args:
      observer: a `MinMax` or a `Sketch`, or a pytree of them; "percentile" and "mse" need a
        `Sketch`.
      method: "absmax" (symmetric only) or "minmax": everything seen fits. "percentile": this share
        of the values fits, of the absolute values when symmetric, half of the rest beyond each
        end otherwise. "mse": the range of "minmax", shrunk towards its middle (zero when
        symmetric) by the ratio that makes the mean squared error least; values are taken as
        spread evenly inside the sketch's buckets.
      symmetric: without offset; otherwise the whole code range spans the range of the values.
      percentile: in (0, 100].
      ratios: the ratios that "mse" tries, in (0, 1]; 0.20, 0.21 .. 1.00 by default.

    Returns:
      A `Calibration`, or a pytree of them. A channel that was never observed, or saw only zeros,
      gets scale 1 (and offset 0).

    Raises:
      ValueError: an unknown method, "absmax" without symmetry, a percentile or ratio out of range.
      TypeError: an observer that has not kept what the method needs.
    """
    check_choice("method", method, METHODS)
    if method == "absmax" and not symmetric:
        raise ValueError(
            '`symmetric=False` needs a method with an offset: "minmax", "percentile" or "mse".'
        )
    if not 0 < percentile <= 100:
        raise ValueError(f"`percentile` must be in (0, 100], got {percentile}.")
    tried = np.linspace(0.2, 1.0, 81) if ratios is None else np.asarray(ratios)
    if tried.ndim != 1 or not tried.size or not ((tried > 0) & (tried <= 1)).all():
        raise ValueError(f"`ratios` must be a list of numbers in (0, 1], got {tried.tolist()}.")

    def calibrate_one(observer: Any) -> Calibration:
        if method in ("percentile", "mse") and not isinstance(observer, Sketch):
            raise TypeError(
                f'`method="{method}"` needs a Sketch observer, got {type(observer).__name__}.'
            )
        if method == "percentile":
            return _from_percentile(observer, percentile, symmetric)
        if method == "mse":
            spec: Any = spec_of(observer.range.low)
            out = Calibration(spec, None if symmetric else spec)
            return automatically(lambda o: _from_search(o, tried, symmetric), out, observer)
        seen = observer.range if isinstance(observer, Sketch) else observer
        return scale_and_offset(seen.low, seen.high, symmetric=symmetric)

    return jax.tree.map(
        calibrate_one, observer, is_leaf=lambda node: isinstance(node, MinMax | Sketch)
    )


def _from_percentile(sketch: Sketch, percentile: float, symmetric: bool) -> Calibration:
    outside = 1 - percentile / 100
    if symmetric:
        high = sketch.magnitude_quantile(outside)
        return scale_and_offset(-high, high)
    low, high = sketch.quantiles(outside / 2)
    return scale_and_offset(low, high, symmetric=False)


def _from_search(sketch: Sketch, tried: np.ndarray, symmetric: bool) -> Calibration:
    """Tries every ratio on points spread evenly inside the buckets, weighted by the counts."""
    seen = sketch.range
    ones = (1,) * seen.low.ndim
    low, high = (edge.reshape(-1, *ones) for edge in sketch.edges())
    bucket = jnp.arange(len(low), dtype=jnp.int32).reshape(-1, *ones)
    # The buckets at both ends reach to the values seen.
    low = jnp.where(bucket == 0, jnp.minimum(low, seen.low[None]), low)
    high = jnp.where(bucket == len(high) - 1, jnp.maximum(high, seen.high[None]), high)
    parts = (jnp.arange(_POINTS_PER_BUCKET, dtype=jnp.float32) + 0.5) / _POINTS_PER_BUCKET
    parts = parts.reshape(-1, *ones)
    points = low[:, None] + (high - low)[:, None] * parts[None]  # [buckets, parts, *channels]
    points = jnp.clip(points, seen.low[None, None], seen.high[None, None])
    weights = jnp.moveaxis(sketch.counts, -1, 0)[:, None].astype(jnp.float32)

    magnitude = seen.absolute_maximum()
    middle = jnp.zeros_like(magnitude) if symmetric else seen.low / 2 + seen.high / 2
    half = magnitude if symmetric else seen.high / 2 - seen.low / 2

    def parameters(ratio: jax.Array) -> Calibration:
        return scale_and_offset(middle - ratio * half, middle + ratio * half, symmetric=symmetric)

    def error(ratio: jax.Array) -> jax.Array:
        noise = fake_quantize(points, *parameters(ratio)).values - points
        return jnp.sum(weights * noise * noise, axis=(0, 1))

    ratios = jnp.asarray(np.sort(tried)[::-1].copy(), jnp.float32)  # of equal errors, the widest

    def keep_better(number, kept):
        ratio = take_one(ratios, number)
        errors = error(ratio)
        better = errors < kept[0]
        return jnp.where(better, errors, kept[0]), jnp.where(better, ratio, kept[1])

    none = (jnp.full_like(half, jnp.inf), jnp.full_like(half, ratios[0]))
    return parameters(lax.fori_loop(0, len(ratios), keep_better, none)[1])
