"""Streaming observers of K and V channels: the little that calibration keeps of what it has seen.

An observer is a pytree; its channels are the trailing dimensions of the values it observes (for a
cache [Nkv, D], for the layers of a model [L, Nkv, D]). Values that are not finite are left out, so
a padded token is left out by filling it with NaN. Merging two observers equals, to the bit,
observing the union of what they saw, in any order.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jax_kvcache.export import register_dataclass_serialization
from jax_kvcache.ops.explicit import automatically, merge_leading, spec_of

Observers = TypeVar("Observers")  # an observer, or a pytree of them

_MANTISSA_BITS, _EXPONENT_BIAS = 23, 127  # of float32


def check_channels(values: jax.Array, channels: Sequence[int]) -> None:
    """Raises ValueError unless `values` is [..., *channels]."""
    rank = len(channels)
    if values.ndim < rank or values.shape[values.ndim - rank :] != tuple(channels):
        raise ValueError(
            f"`values` must have the trailing dimensions {list(channels)}, got "
            f"{list(values.shape)}."
        )


def tokens_first(values: jax.Array, channels: Sequence[int]) -> jax.Array:
    """[N, *channels] float32."""
    check_channels(values, channels)
    return merge_leading(values, values.ndim - len(channels)).astype(jnp.float32)


def check_same_channels(channels: Sequence[int], others: Sequence[int]) -> None:
    """Raises ValueError unless the observer to merge with has the same channels."""
    if tuple(channels) != tuple(others):
        raise ValueError(f"`other` must have the channels {list(channels)}, got {list(others)}.")


@register_dataclass_serialization
@partial(jax.tree_util.register_dataclass, data_fields=["low", "high"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class MinMax:
    """Smallest and largest value of each channel; `absolute_maximum` follows from them.

    Attributes:
      low: [*channels] float32; inf for a channel that was never observed.
      high: [*channels] float32; -inf for a channel that was never observed.
    """

    low: jax.Array
    high: jax.Array

    @classmethod
    def create(cls, channels: Sequence[int]) -> Self:
        """An observer of values [..., *channels] that has seen nothing."""
        return cls(*(jnp.full(channels, end, jnp.float32) for end in (jnp.inf, -jnp.inf)))

    def update(self, values: jax.Array) -> "MinMax":
        """The observer that has also seen `values` [..., *channels], of any float dtype."""
        values = tokens_first(values, self.low.shape)
        finite = jnp.isfinite(values)
        return MinMax(
            jnp.minimum(self.low, jnp.min(values, 0, initial=jnp.inf, where=finite)),
            jnp.maximum(self.high, jnp.max(values, 0, initial=-jnp.inf, where=finite)),
        )

    def merge(self, other: "MinMax") -> "MinMax":
        """The observer of the union of what both saw."""
        check_same_channels(self.low.shape, other.low.shape)
        return MinMax(jnp.minimum(self.low, other.low), jnp.maximum(self.high, other.high))

    def absolute_maximum(self) -> jax.Array:
        """[*channels] float32; -inf for a channel that was never observed."""
        return jnp.maximum(-self.low, self.high)


@register_dataclass_serialization
@partial(
    jax.tree_util.register_dataclass,
    data_fields=["range", "counts"],
    meta_fields=["precision", "exponents"],
)
@dataclasses.dataclass(frozen=True)
class Sketch:
    """Histogram of each channel with buckets of constant relative width, in bounded memory.

    A bucket is the set of numbers that share sign, exponent and the leading `precision` bits of
    the mantissa, so that filing a value is exact integer work. `quantiles` returns the middle of a
    bucket: within 2**-(precision + 1) of the exact quantile, relative, when that lies in
    [2**exponents[0], 2**exponents[1]); within 2**exponents[0], absolute, below; larger values share
    one bucket, for which it returns the extreme value of that sign. Counts are int32: at most
    2**31 - 1 values per channel.

    Attributes:
      range: the `MinMax` of the same values.
      counts: [*channels, 2 * n] int32 from the most negative bucket to the most positive one,
        n = (exponents[1] - exponents[0]) * 2**precision + 1.
      precision: mantissa bits kept.
      exponents: powers of two between which the relative error holds.
    """

    range: MinMax
    counts: jax.Array
    precision: int
    exponents: tuple[int, int]

    @classmethod
    def create(
        cls, channels: Sequence[int], precision: int = 5, exponents: tuple[int, int] = (-14, 16)
    ) -> Self:
        """An observer of values [..., *channels] that has seen nothing; 7.5 KiB per channel.

        Raises:
          ValueError: `precision` is not in [0, 23], or `exponents` are not two of float32's normal
            numbers, the smaller one first.
        """
        if not 0 <= precision <= _MANTISSA_BITS:
            raise ValueError(f"`precision` must be in [0, {_MANTISSA_BITS}], got {precision}.")
        if not -_EXPONENT_BIAS < exponents[0] < exponents[1] <= _EXPONENT_BIAS:
            raise ValueError(
                f"`exponents` must be (low, high) with -127 < low < high <= 127, got {exponents}."
            )
        half = ((exponents[1] - exponents[0]) << precision) + 1
        counts = jnp.zeros((*channels, 2 * half), jnp.int32)
        return cls(MinMax.create(channels), counts, precision, (exponents[0], exponents[1]))

    def update(self, values: jax.Array) -> "Sketch":
        """The observer that has also seen `values` [..., *channels], of any float dtype."""
        channels = self.counts.shape[:-1]
        values = tokens_first(values, channels)
        half = self.counts.shape[-1] // 2
        bits = lax.bitcast_convert_type(jnp.abs(values), jnp.int32)
        magnitude = (bits >> (_MANTISSA_BITS - self.precision)) - self._first_bucket()
        magnitude = jnp.clip(magnitude, 0, half - 1)
        bucket = jnp.where(values < 0, half - 1 - magnitude, half + magnitude)
        finite = jnp.isfinite(values)
        counts = automatically(count_into, spec_of(self.counts), self.counts, bucket, finite)
        return dataclasses.replace(self, range=self.range.update(values), counts=counts)

    def merge(self, other: "Sketch") -> "Sketch":
        """The observer of the union of what both saw; both have one precision and exponents."""
        mine, theirs = (self.precision, self.exponents), (other.precision, other.exponents)
        if mine != theirs:
            raise ValueError(f"`other` must have (precision, exponents) = {mine}, got {theirs}.")
        check_same_channels(self.counts.shape[:-1], other.counts.shape[:-1])
        return dataclasses.replace(
            self, range=self.range.merge(other.range), counts=self.counts + other.counts
        )

    def quantiles(self, outside: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """The range that leaves the share `outside` of the values beyond each of its ends.

        Args:
          outside: in [0, 1); floor(float32(outside) * count) values may lie beyond each end.

        Returns:
          low, high: [*channels] float32; inf and -inf for a channel that was never observed.

        Raises:
          ValueError: `outside` is a number out of its range; a traced one is not checked.
        """
        _check_outside(outside)
        seen, middles = self.range, self._middles()
        low = -_upper_quantile(self.counts[..., ::-1], middles, -seen.high, -seen.low, outside)
        return low, _upper_quantile(self.counts, middles, seen.low, seen.high, outside)

    def magnitude_quantile(self, outside: ArrayLike) -> jax.Array:
        """[*channels] float32: the share `outside` of the absolute values lies beyond it."""
        _check_outside(outside)
        half = self.counts.shape[-1] // 2
        counts = self.counts[..., half:] + self.counts[..., :half][..., ::-1]
        middles, largest = self._middles()[half:], self.range.absolute_maximum()
        return _upper_quantile(counts, middles, jnp.zeros_like(largest), largest, outside)

    def edges(self) -> tuple[jax.Array, jax.Array]:
        """Lower and upper edge of each bucket, [2 * n] float32 each."""
        half = self.counts.shape[-1] // 2
        number = jnp.arange(half + 1, dtype=jnp.int32)
        bits = (number + self._first_bucket()) << (_MANTISSA_BITS - self.precision)
        edges = lax.bitcast_convert_type(bits, jnp.float32)
        edges = jnp.where(number == 0, jnp.zeros_like(edges), edges)
        low, high = edges[:-1], edges[1:]
        return jnp.concatenate([-high[::-1], low]), jnp.concatenate([-low[::-1], high])

    def _first_bucket(self) -> int:
        return (self.exponents[0] + _EXPONENT_BIAS) << self.precision

    def _middles(self) -> jax.Array:
        """Infinite for the buckets at both ends, which have no middle."""
        low, high = self.edges()
        number = jnp.arange(len(low), dtype=jnp.int32)
        middles = jnp.where(number == 0, -jnp.inf, (low + high) / 2)
        return jnp.where(number == len(low) - 1, jnp.inf, middles)


def count_into(counts: jax.Array, bucket: jax.Array, finite: jax.Array) -> jax.Array:
    """Adds one to the [*channels, buckets] counts where a value [N, *channels] is finite."""
    flat = counts.reshape(-1, counts.shape[-1])
    bucket = bucket.reshape(len(bucket), len(flat))
    seen = finite.reshape(bucket.shape).astype(jnp.int32)
    channel = jnp.arange(len(flat), dtype=jnp.int32)[None, :]
    return flat.at[channel, bucket].add(seen).reshape(counts.shape)


def _check_outside(outside: Any) -> None:
    if not isinstance(outside, jax.core.Tracer) and not 0 <= outside < 1:
        raise ValueError(f"`outside` must be in [0, 1), got {outside}.")


def _upper_quantile(
    counts: jax.Array,
    middles: jax.Array,
    smallest: jax.Array,
    largest: jax.Array,
    outside: ArrayLike,
) -> jax.Array:
    """Middle of the lowest bucket with at most the share `outside` of the values above it."""
    total = jnp.sum(counts, -1, dtype=jnp.int32, keepdims=True)
    share = jnp.asarray(outside, jnp.float32)
    allowed = jnp.floor(share * total.astype(jnp.float32)).astype(jnp.int32)
    above = total - jnp.cumsum(counts, -1, dtype=jnp.int32)
    bucket = jnp.argmax(above <= allowed, -1)
    chosen = automatically(lambda m, b: m[b], spec_of(smallest), middles, bucket)
    return jnp.clip(chosen, smallest, largest)


def _is_observer(node: Any) -> bool:
    return isinstance(node, MinMax | Sketch)


def observe(observers: Observers, values: Any) -> Observers:
    """Updates a pytree of observers with a pytree of values of the same structure."""
    updated: Observers = jax.tree.map(
        lambda o, v: o.update(v), observers, values, is_leaf=_is_observer
    )
    return updated


def merge(observers: Observers, others: Observers) -> Observers:
    """Merges two pytrees of observers, as of several hosts: the union of what they saw."""
    merged: Observers = jax.tree.map(
        lambda o, p: o.merge(p), observers, others, is_leaf=_is_observer
    )
    return merged
