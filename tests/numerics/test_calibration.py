"""Calibration: scales that the operator can use, codes equal to the operator's, bounded errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle

from jax_kvcache import dequant_rope_quant_kvcache, numerics

CHANNELS = (2, 4)
TOKENS = 64
TINY = np.finfo(np.float32).tiny
CASES = [("absmax", True), ("minmax", True), ("minmax", False), ("percentile", True),
         ("percentile", False), ("mse", True), ("mse", False)]  # fmt: skip
fake_quantize = jax.jit(numerics.fake_quantize)


@functools.partial(jax.jit, static_argnames=("method", "symmetric", "percentile"))
def calibrate(values, **how):
    sketch = numerics.Sketch.create(values.shape[1:]).update(values)
    return numerics.calibrate(sketch, ratios=np.linspace(0.5, 1, 11), **how)


def random_values(seed):
    """Channels of very different sizes, half of them far from zero compared with their spread."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((TOKENS, *CHANNELS))
    values += np.where(rng.random(CHANNELS) < 0.5, rng.uniform(-1000, 1000, CHANNELS), 0)
    return (values * np.exp2(rng.integers(-40, 40, CHANNELS))).astype(np.float32)


@pytest.mark.parametrize("symmetric", [True, False])
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_round_trip_inside_the_range(symmetric, seed):
    values = random_values(seed)
    scale, offset = calibrate(values, method="minmax", symmetric=symmetric)
    codes, restored = fake_quantize(values, scale, offset)
    wide = values.astype(np.float64)
    shift = 0 if offset is None else np.asarray(offset, np.float64)
    exact = (np.asarray(codes, np.float64) - shift) * np.asarray(scale, np.float64)
    # Rounding: of z = value / scale + offset, each term below 2**16, so by 2 * 2**-8 at most; and
    # of the dequantised value, relative to the terms.
    step = np.asarray(scale, np.float64)
    assert (np.abs(exact - wide) <= step * (0.5 + 2.0**-7)).all()
    rounding = 2.0**-23 * step * (np.abs(shift) + 128)
    assert (np.abs(np.asarray(restored, np.float64) - exact) <= rounding).all()
    expected = oracle.quantize(values, np.asarray(scale), offset)
    np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize(("method", "symmetric"), CASES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_codes_equal_the_operators(method, symmetric, dtype):
    """Values on and off the ties of the calibrated grid, and some that are not finite."""
    rng = np.random.default_rng(7)
    calibration = calibrate(random_values(3), method=method, symmetric=symmetric, percentile=90)
    scale, offset = (None if p is None else np.asarray(p) for p in calibration)
    half_codes = rng.integers(-300, 300, (TOKENS, *CHANNELS)) / 2
    with np.errstate(over="ignore"):
        values = ((half_codes - (0 if offset is None else offset)) * scale).astype(np.float32)
        values[0, 0] = [np.nan, np.inf, -np.inf, 0]
        values = values.astype(jnp.dtype(dtype))
    table = np.ones((TOKENS, CHANNELS[1]), values.dtype)
    x = np.concatenate([values, values, values], 1).reshape(TOKENS, -1)
    result = dequant_rope_quant_kvcache(
        x, table, 0 * table, *np.zeros((2, 1, TOKENS, *CHANNELS), np.int8),
        np.arange(TOKENS, dtype=np.int32), scale, scale, offset_k=offset, offset_v=offset,
        kv_output=True, cache_mode="page",
    )  # fmt: skip
    for written, cache in ((result.k, result.k_cache), (result.v, result.v_cache)):
        codes, restored = fake_quantize(written, scale, offset)
        np.testing.assert_array_equal(codes, cache[0])
        steps = np.asarray(codes, np.float32)
        expected = (steps if offset is None else steps - offset) * scale
        np.testing.assert_array_equal(restored, expected)


@pytest.mark.parametrize(("method", "symmetric"), CASES)
def test_constant_and_unobserved_channels(method, symmetric):
    constants = np.array([0, -3.5, 1e-30, 7e4, 1e-42, 3e38, -3e38, np.nan], np.float32)
    values = np.broadcast_to(constants, (TOKENS, 8))
    scale, offset = calibrate(values, method=method, symmetric=symmetric)
    assert np.isfinite(scale).all()
    assert (np.asarray(scale) >= TINY).all()
    without = [0, 4, 7]  # zeros, a subnormal number, nothing
    assert (np.asarray(scale)[without] == 1).all()
    _, restored = fake_quantize(values, scale, offset)
    assert offset is None if symmetric else (np.asarray(offset)[without] == 0).all()
    np.testing.assert_allclose(restored[0, [1, 2, 3, 5, 6]], constants[[1, 2, 3, 5, 6]], rtol=1e-4)
    assert (np.abs(np.asarray(restored)[0, [0, 4]]) <= 1e-41).all()


def test_ranges_of_two_signs_do_not_overflow():
    values = np.array([[3e38], [-3e38]], np.float32)
    scale, offset = calibrate(values, method="minmax", symmetric=False)
    np.testing.assert_allclose(scale, 6e38 / 255)
    np.testing.assert_array_equal(fake_quantize(values, scale, offset).codes, [[127], [-128]])


def test_asymmetric_uses_the_full_code_range():
    values = np.random.default_rng(0).uniform(3, 4, (TOKENS, *CHANNELS)).astype(np.float32)
    scale, offset = calibrate(values, method="minmax", symmetric=False)
    codes = np.asarray(fake_quantize(values, scale, offset).codes)
    assert (codes.min(0) == -128).all()
    assert (codes.max(0) == 127).all()
    symmetric = calibrate(values, method="absmax")
    assert (np.asarray(symmetric.scale) > 3.9 * np.asarray(scale)).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_percentile_leaves_its_share_outside(symmetric):
    values = np.random.default_rng(0).standard_normal((4000, 2)).astype(np.float32)
    scale, offset = calibrate(values, method="percentile", symmetric=symmetric, percentile=95)
    z = values / scale + (0 if offset is None else offset)
    outside = np.mean((z < (-127 if symmetric else -128)) | (z > 127), 0)
    np.testing.assert_allclose(outside, 0.05, atol=0.006)  # 2**-6 of 2 sigma, density 0.054


@pytest.mark.parametrize("symmetric", [True, False])
def test_search_finds_the_least_error(symmetric):
    """Against every ratio tried on the values themselves."""
    rng = np.random.default_rng(0)
    values = np.stack([rng.standard_normal(40000), rng.laplace(size=40000) + 3], 1)
    values[0] = [10, -30]
    values = values.astype(np.float32)

    def error(calibration):
        restored = np.asarray(fake_quantize(values, *calibration).values)
        return np.sum((restored - values) ** 2, 0)

    low, high = values.min(0), values.max(0)
    middle = 0 if symmetric else (low + high) / 2
    half = np.abs(values).max(0) if symmetric else (high - low) / 2
    tried = [
        error(numerics.scale_and_offset(middle - r * half, middle + r * half, symmetric=symmetric))
        for r in np.linspace(0.5, 1, 11)
    ]
    best, widest = np.min(tried, 0), tried[-1]
    found = error(calibrate(values, method="mse", symmetric=symmetric))
    assert (found <= 1.02 * best).all()
    assert (best < widest).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("exponents", [(-14, 16), (-14, -3), (-30, 0)])
def test_search_with_values_beyond_the_sketch(symmetric, exponents):
    """They share one bucket, and are not taken for values at its beginning."""
    values = np.random.default_rng(3).standard_normal((20_000, 3)).astype(np.float32)
    values *= np.float32(2.0 ** exponents[1])
    sketch = numerics.Sketch.create((3,), exponents=exponents).update(values)

    def error(method):
        how = numerics.calibrate(sketch, method=method, symmetric=symmetric)
        return ((np.asarray(fake_quantize(values, *how).values) - values) ** 2).mean(axis=0)

    assert (error("mse") < 1.3 * error("minmax")).all()


def test_pytrees_and_ranges_without_a_sketch():
    values = jnp.asarray(random_values(0))
    observers = {"k": numerics.MinMax.create(CHANNELS), "v": numerics.Sketch.create(CHANNELS)}
    result = numerics.calibrate(numerics.observe(observers, {"k": values, "v": values}))
    np.testing.assert_array_equal(result["k"].scale, jnp.abs(values).max(0) / 127)
    np.testing.assert_array_equal(result["v"].scale, result["k"].scale)


def test_errors():
    observer = numerics.MinMax.create(CHANNELS)
    with pytest.raises(ValueError, match="`method` must be 'absmax' or 'minmax' or 'percentile'"):
        numerics.calibrate(observer, method="entropy")
    with pytest.raises(ValueError, match="`symmetric=False` needs a method with an offset"):
        numerics.calibrate(observer, symmetric=False)
    with pytest.raises(ValueError, match=r"`percentile` must be in \(0, 100\], got 0."):
        numerics.calibrate(observer, percentile=0)
    with pytest.raises(TypeError, match='`method="mse"` needs a Sketch observer'):
        numerics.calibrate(observer, method="mse")
    values, scale = jnp.ones((16, 4, 2)), jnp.ones(CHANNELS)
    with pytest.raises(ValueError, match=r"trailing dimensions \[2, 4\], got \[16, 4, 2\]"):
        numerics.fake_quantize(values, scale)
    with pytest.raises(ValueError, match=r"`offset` must have shape \[\*channels\] = \[2, 4\]"):
        numerics.fake_quantize(jnp.ones(CHANNELS), scale, jnp.ones(8))


@pytest.mark.parametrize("ratios", [[], 0.5, [[0.5]], [0.0, 1], [0.5, 1.01], [0.5, np.nan]])
def test_ratios_out_of_range(ratios):
    with pytest.raises(ValueError, match=r"`ratios` must be a list of numbers in \(0, 1\], got "):
        numerics.calibrate(numerics.Sketch.create(CHANNELS), method="mse", ratios=ratios)
