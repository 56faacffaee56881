"""What quantisation costs: errors of the values, of attention, and of what a model predicts."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_kvcache.export import (
    register_dataclass_serialization,
    register_namedtuple_serialization,
)
from jax_kvcache.numerics.calibration import fake_quantize
from jax_kvcache.numerics.observers import check_same_channels, tokens_first
from jax_kvcache.ops.checks import check_shape
from jax_kvcache.ops.explicit import automatically, spec_of
from jax_kvcache.ops.indexing import take_one


def decibels(signal, noise):
    """10 * log10(signal / noise) of two powers; inf where there is no noise."""
    return 10 * jnp.log10(signal / noise)


def _count(histogram, codes, finite):
    """Adds one to the code [N, *channels] of every finite value."""
    flat = histogram.reshape(-1, 256)
    code = codes.reshape(len(codes), -1).astype(jnp.int32) + 128
    channel = jnp.arange(len(flat), dtype=jnp.int32)[None, :]
    seen = finite.reshape(code.shape).astype(jnp.int32)
    return flat.at[channel, code].add(seen).reshape(histogram.shape)


def _ratio(part, whole):
    return part.astype(jnp.float32) / whole.astype(jnp.float32)


def check_alike(name, value, of_name, of):
    """Raises ValueError unless two arrays have one shape: broadcasting would compare others."""
    if value.shape != of.shape:
        raise ValueError(
            f"`{name}` must have the shape of `{of_name}`, {list(of.shape)}, "
            f"got {list(value.shape)}."
        )


def sqnr(values, approximation, axis=None):
    """Signal-to-quantisation-noise ratio in decibels, over `axis` (all by default).

    Raises:
      ValueError: the two arrays differ in shape.
    """
    check_alike("approximation", approximation, "values", values)
    values = values.astype(jnp.float32)
    noise = values - approximation
    return decibels(jnp.sum(values * values, axis), jnp.sum(noise * noise, axis))


@register_namedtuple_serialization
class ErrorReport(NamedTuple):
    """Errors per channel [*channels], or in total [].

    Attributes:
      sqnr: signal-to-quantisation-noise ratio in decibels.
      max_error: largest |error| in units of the channel's scale; 0.5 unless something saturates.
      saturation_rate: share of the values beyond the range of the codes.
      code_usage: share of the 256 codes that occur.
    """

    sqnr: jax.Array
    max_error: jax.Array
    saturation_rate: jax.Array
    code_usage: jax.Array


@register_dataclass_serialization
@partial(
    jax.tree_util.register_dataclass,
    data_fields=["signal", "noise", "max_error", "saturated", "histogram"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class ErrorObserver:
    """Streaming errors of the operator's codes per channel, over the finite values.

    Attributes:
      signal, noise: [*channels] float32 sums of squares.
      max_error: [*channels] float32 in units of the scale.
      saturated: [*channels] int32.
      histogram: [*channels, 256] int32, how often each code occurred, code -128 first.
    """

    signal: jax.Array
    noise: jax.Array
    max_error: jax.Array
    saturated: jax.Array
    histogram: jax.Array

    @classmethod
    def create(cls, channels):
        """An observer of values [..., *channels] that has seen nothing."""
        zero = jnp.zeros(channels, jnp.float32)
        return cls(
            zero, zero, zero, jnp.zeros(channels, jnp.int32), jnp.zeros((*channels, 256), jnp.int32)
        )

    def update(self, values, scale, offset=None):
        """The observer that has also seen `values` [..., *channels] quantised so."""
        channels = self.signal.shape
        values = tokens_first(values, channels)
        check_shape("scale", scale, ("*channels", channels))
        if offset is not None:
            check_shape("offset", offset, ("*channels", channels))
        codes, approximation = fake_quantize(values, scale, offset)
        finite = jnp.isfinite(values)
        noise = jnp.where(finite, values - approximation, 0)
        scale = jnp.asarray(scale)[None]
        z = values / scale
        if offset is not None:
            z = z + jnp.asarray(offset)[None]
        beyond = finite & ((z < -128.5) | (z > 127.5))
        histogram = automatically(_count, spec_of(self.histogram), self.histogram, codes, finite)
        return ErrorObserver(
            self.signal + jnp.sum(jnp.where(finite, values * values, 0), 0),
            self.noise + jnp.sum(noise * noise, 0),
            jnp.maximum(self.max_error, jnp.max(jnp.abs(noise) / scale, 0, initial=0)),
            self.saturated + jnp.sum(beyond, 0, dtype=jnp.int32),
            histogram,
        )

    def merge(self, other):
        """The observer of the union; the float32 sums are equal but for their rounding."""
        check_same_channels(self.signal.shape, other.signal.shape)
        return ErrorObserver(
            self.signal + other.signal,
            self.noise + other.noise,
            jnp.maximum(self.max_error, other.max_error),
            self.saturated + other.saturated,
            self.histogram + other.histogram,
        )

    def layer(self, index):
        """The observer of one entry of the first channel dimension."""

        def part(leaf):
            spec = jax.sharding.PartitionSpec(*spec_of(leaf)[1:])
            number = index % len(leaf) if isinstance(index, int) else index
            return automatically(take_one, spec, leaf, jnp.asarray(number, jnp.int32))

        return jax.tree.map(part, self)

    def per_channel(self) -> ErrorReport:
        """The report of each channel."""
        return ErrorReport(
            decibels(self.signal, self.noise),
            self.max_error,
            _ratio(self.saturated, jnp.sum(self.histogram, -1, dtype=jnp.int32)),
            jnp.mean(self.histogram > 0, -1, dtype=jnp.float32),
        )

    def total(self) -> ErrorReport:
        """One report for all channels; code usage is their mean."""
        return ErrorReport(
            decibels(jnp.sum(self.signal), jnp.sum(self.noise)),
            jnp.max(self.max_error),
            _ratio(*(jnp.sum(n, dtype=jnp.float32) for n in (self.saturated, self.histogram))),
            jnp.mean(self.histogram > 0, dtype=jnp.float32),
        )


def token_agreement(logits, baseline):
    """Share of positions where both logits [..., vocabulary] have the same largest entry.

    Raises:
      ValueError: the two arrays differ in shape.
    """
    check_alike("logits", logits, "baseline", baseline)
    return jnp.mean(jnp.argmax(logits, -1) == jnp.argmax(baseline, -1), dtype=jnp.float32)


def divergence(logits, baseline):
    """Kullback-Leibler divergence from the baseline's predictions, in nats per position.

    It is the increase of the nll on text drawn from the baseline model itself, in expectation: it
    has no first-order term in the error, so it ranks small errors that the nll of a given text,
    where errors help about as often as they hurt, does not.

    Args:
      logits, baseline: [..., vocabulary].

    Returns:
      [...] float32.

    Raises:
      ValueError: the two arrays differ in shape.
    """
    check_alike("logits", logits, "baseline", baseline)
    log_p, log_q = jax.nn.log_softmax(baseline), jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)


@register_namedtuple_serialization
class PairedDifference(NamedTuple):
    """Mean of value - baseline over pairs, and its standard error."""

    mean: jax.Array
    standard_error: jax.Array


def paired_difference(values, baseline) -> PairedDifference:
    """Compares two runs window by window, which takes out how hard each window is.

    Args:
      values: [W] one number per window, such as its mean nll.
      baseline: [W] the same windows with a float cache.
    """
    values, baseline = jnp.asarray(values), jnp.asarray(baseline)
    if values.ndim != 1:
        raise TypeError(f"`values` must be 1-D, got {values.ndim}-D {list(values.shape)}.")
    check_shape("baseline", baseline, ("W", values.shape))
    difference = values - baseline
    return PairedDifference(
        jnp.mean(difference), jnp.std(difference, ddof=1) / len(difference) ** 0.5
    )
