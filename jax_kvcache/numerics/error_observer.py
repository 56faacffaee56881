"""A streaming observer of what quantisation loses, channel by channel."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from jax_kvcache.export import (
    register_dataclass_serialization,
    register_namedtuple_serialization,
)
from jax_kvcache.numerics.calibration import fake_quantize
from jax_kvcache.numerics.measures import decibels
from jax_kvcache.numerics.observers import check_same_channels, count_into, tokens_first
from jax_kvcache.ops.checks import check_shape
from jax_kvcache.ops.explicit import automatically, spec_of
from jax_kvcache.ops.indexing import take_one


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
    return part.astype(jnp.float32) / whole.astype(jnp.float32)


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
    def create(cls, channels: Sequence[int]) -> Self:
        """An observer of values [..., *channels] that has seen nothing."""
        zero = jnp.zeros(channels, jnp.float32)
        return cls(
            zero, zero, zero, jnp.zeros(channels, jnp.int32), jnp.zeros((*channels, 256), jnp.int32)
        )

    def update(
        self, values: jax.Array, scale: jax.Array, offset: jax.Array | None = None
    ) -> "ErrorObserver":
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
        bucket = codes.astype(jnp.int32) + 128
        spec = spec_of(self.histogram)
        histogram = automatically(count_into, spec, self.histogram, bucket, finite)
        return ErrorObserver(
            self.signal + jnp.sum(jnp.where(finite, values * values, 0), 0),
            self.noise + jnp.sum(noise * noise, 0),
            jnp.maximum(self.max_error, jnp.max(jnp.abs(noise) / scale, 0, initial=0)),
            self.saturated + jnp.sum(beyond, 0, dtype=jnp.int32),
            histogram,
        )

    def merge(self, other: "ErrorObserver") -> "ErrorObserver":
        """The observer of the union; the float32 sums are equal but for their rounding."""
        check_same_channels(self.signal.shape, other.signal.shape)
        return ErrorObserver(
            self.signal + other.signal,
            self.noise + other.noise,
            jnp.maximum(self.max_error, other.max_error),
            self.saturated + other.saturated,
            self.histogram + other.histogram,
        )

    def layer(self, index: int) -> "ErrorObserver":
        """The observer of one entry of the first channel dimension."""

        def part(leaf: jax.Array) -> jax.Array:
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
