"""Observers: merging equals the union, and the sketch keeps its stated error on hostile streams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_kvcache import numerics

CHANNELS = (2, 3)
STREAM = 64  # tokens of the random streams: one shape, so one compilation
observe = jax.jit(numerics.observe)
quantiles = jax.jit(numerics.Sketch.quantiles)
magnitude_quantile = jax.jit(numerics.Sketch.magnitude_quantile)


def random_stream(seed):
    """Values of very different sizes in each channel, some of them not finite."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((STREAM, *CHANNELS)) * np.exp2(rng.integers(-30, 25, CHANNELS))
    values[rng.random(values.shape) < 0.05] = np.nan
    values[rng.random(values.shape) < 0.02] = -np.inf
    return values.astype(np.float32)


def assert_same_state(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", [numerics.MinMax, numerics.Sketch])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(0, STREAM))
def test_merge_equals_union(kind, seed, cut):
    values = random_stream(seed)
    outside = np.full_like(values, np.nan)  # NaN marks what the other host saw
    mine = np.arange(STREAM)[:, None, None] < cut
    empty = kind.create(CHANNELS)
    union = observe(empty, values)
    first = observe(empty, np.where(mine, values, outside))
    second = observe(empty, np.where(mine, outside, values))
    assert_same_state(numerics.merge(first, second), union)
    assert_same_state(numerics.merge(second, first), union)
    assert_same_state(observe(first, np.where(mine, outside, values)), union)


def test_range_is_that_of_the_finite_values():
    values = random_stream(1)
    finite = np.where(np.isfinite(values), values, np.nan)
    for observer in (
        observe(numerics.MinMax.create(CHANNELS), values),
        observe(numerics.Sketch.create(CHANNELS), values).range,
    ):
        np.testing.assert_array_equal(observer.low, np.nanmin(finite, 0))
        np.testing.assert_array_equal(observer.high, np.nanmax(finite, 0))
        np.testing.assert_array_equal(observer.absolute_maximum(), np.nanmax(np.abs(finite), 0))
    counts = observe(numerics.Sketch.create(CHANNELS), values).counts
    np.testing.assert_array_equal(counts.sum(-1), np.isfinite(values).sum(0))


def test_pytrees_of_layers():
    values = {"k": jnp.ones((4, 3, *CHANNELS)), "v": -jnp.ones((4, 3, *CHANNELS))}
    empty = {"k": numerics.MinMax.create((3, *CHANNELS)), "v": numerics.Sketch.create(CHANNELS)}
    seen = observe(empty, values)
    assert seen["k"].low.shape == (3, *CHANNELS)
    assert seen["v"].counts.sum() == 12 * 6
    assert_same_state(numerics.merge(seen, empty), seen)


MILLION = 10**6


def adversarial_streams():
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(MILLION).astype(np.float32)
    one_outlier = normal.copy()
    one_outlier[123456] = 3e4
    return {
        "sorted": np.sort(normal),
        "reversed": np.sort(normal)[::-1],
        "constant": np.full(MILLION, -3.7, np.float32),
        "one outlier in 10^6": one_outlier,
        "two values": np.where(np.arange(MILLION) % 1000 == 0, 1000, 1e-3).astype(np.float32),
        "all magnitudes": np.exp2(rng.uniform(-30, 15.9, MILLION)).astype(np.float32),
        "powers of two": np.exp2(rng.integers(-20, 17, MILLION)).astype(np.float32),
        "past the largest bucket": (1e6 * normal).astype(np.float32),
    }


@pytest.fixture(scope="module")
def sketches():
    """Each stream as one channel, in ten pieces, and the stream."""
    streams = adversarial_streams()
    stacked = np.stack(list(streams.values()), 1)
    sketch = numerics.Sketch.create((len(streams),))
    for piece in np.split(stacked, 10):
        sketch = observe(sketch, piece)
    return sketch, streams


def exact_upper(values, outside):
    """The smallest value with at most floor(outside * count) values above it."""
    allowed = int(np.floor(np.float32(outside) * np.float32(len(values))))
    return np.sort(values)[len(values) - 1 - allowed]


def assert_within_stated_error(got, exact, extremes, where):
    if abs(exact) >= 2.0**16:
        assert got == extremes[int(exact > 0)], where
    else:
        assert abs(got - exact) <= max(abs(exact) * 2.0**-6, 2.0**-14), (where, got, exact)


@pytest.mark.parametrize("outside", [0.0, 1e-6, 1e-5, 1e-3, 0.01, 0.25, 0.5, 0.9])
def test_sketch_keeps_its_stated_error(sketches, outside):
    sketch, streams = sketches
    low, high = quantiles(sketch, outside)
    magnitude = magnitude_quantile(sketch, outside)
    for i, (name, values) in enumerate(streams.items()):
        exact_low = -exact_upper(-values, outside)
        exact_magnitude = exact_upper(np.abs(values), outside)
        where = f"{name}, {outside}"
        extremes = values.min(), values.max()
        assert_within_stated_error(high[i], exact_upper(values, outside), extremes, where)
        assert_within_stated_error(low[i], exact_low, extremes, where)
        extremes = None, np.abs(values).max()
        assert_within_stated_error(magnitude[i], exact_magnitude, extremes, where)


def test_sketch_of_a_constant_is_exact(sketches):
    sketch, streams = sketches
    i = list(streams).index("constant")
    low, high = quantiles(sketch, 0.001)
    assert low[i] == high[i] == np.float32(-3.7)


def test_more_precision_and_other_exponents():
    values = np.exp2(np.random.default_rng(2).uniform(-9, 9, (4096, 1))).astype(np.float32)
    sketch = observe(numerics.Sketch.create((1,), 8, (-10, 10)), values)
    for outside in (0.1, 0.3, 0.5, 0.7):
        exact = exact_upper(values[:, 0], outside)
        assert abs(magnitude_quantile(sketch, outside)[0] - exact) <= exact * 2.0**-9


@pytest.mark.parametrize("kind", [numerics.MinMax, numerics.Sketch])
def test_no_tokens(kind):
    empty = kind.create(CHANNELS)
    assert_same_state(empty.update(jnp.zeros((0, 5, *CHANNELS))), empty)


@pytest.mark.parametrize("spec", [P(None, "x"), P("y", "x"), P(("x", "y"))])
@pytest.mark.parametrize("kind", [numerics.MinMax, numerics.Sketch])
def test_tokens_over_explicit_axes(kind, spec):
    values = random_stream(7).reshape(8, 8, *CHANNELS)
    mesh = jax.make_mesh((2, 2), ("x", "y"), (AxisType.Explicit,) * 2)
    placed = jax.device_put(values, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        seen = kind.create(CHANNELS).update(placed)
    assert_same_state(seen, kind.create(CHANNELS).update(values))


def test_errors_of_no_tokens():
    empty = numerics.ErrorObserver.create(CHANNELS)
    assert_same_state(empty.update(jnp.zeros((0, *CHANNELS)), jnp.ones(CHANNELS)), empty)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"precision": 24}, r"`precision` must be in \[0, 23\], got 24"),
        ({"precision": -1}, "got -1"),
        ({"exponents": (16, -14)}, r"`exponents` must be \(low, high\) .* got \(16, -14\)"),
        ({"exponents": (-127, 0)}, "-127 < low"),
        ({"exponents": (0, 128)}, "high <= 127"),
    ],
)
def test_sketches_that_cannot_be(how, message):
    with pytest.raises(ValueError, match=message):
        numerics.Sketch.create(CHANNELS, **how)


def test_memory_does_not_grow():
    sketch = observe(numerics.Sketch.create((1,)), jnp.ones((1000, 1)))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(sketch)) < 7.6 * 1024


def test_errors():
    with pytest.raises(ValueError, match=r"`values` must have the trailing dimensions \[2, 3\]"):
        numerics.MinMax.create(CHANNELS).update(jnp.ones((5, 3, 2)))
    with pytest.raises(ValueError, match=r"`other` must have \(precision, exponents\) = \(5, "):
        numerics.merge(numerics.Sketch.create((1,)), numerics.Sketch.create((1,), precision=4))


@pytest.mark.parametrize("kind", [numerics.MinMax, numerics.Sketch, numerics.ErrorObserver])
def test_merge_takes_the_same_channels(kind):
    """Not even channels that would broadcast."""
    for others in ((1, 3), (3,)):
        with pytest.raises(ValueError, match=r"`other` must have the channels \[2, 3\], got \["):
            kind.create(CHANNELS).merge(kind.create(others))


@pytest.mark.parametrize("outside", [-1e-3, 1, np.nan])
def test_quantiles_out_of_range(outside):
    sketch = numerics.Sketch.create((1,))
    for method in (sketch.quantiles, sketch.magnitude_quantile):
        with pytest.raises(ValueError, match=r"`outside` must be in \[0, 1\), got "):
            method(outside)
