"""Linear layers against NumPy: exact where the arithmetic is integer, float32 otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_kvcache.model.linear import (
    DynamicInt8Linear,
    FloatLinear,
    StaticInt8Linear,
    matmul,
    matmul_int8,
    quantize_weight,
)

RNG = np.random.default_rng(0)
ROWS = [(1,), (2,), (3, 5)]


@pytest.mark.parametrize("rows", ROWS)
def test_int8(rows):
    """One row, which is multiplied twice, and more."""
    codes = RNG.integers(-128, 128, (*rows, 70)).astype(np.int8)
    weight = RNG.integers(-128, 128, (33, 70)).astype(np.int8)
    product = jax.jit(matmul_int8)(codes, weight)
    assert product.dtype == jnp.int32
    np.testing.assert_array_equal(product, codes.astype(int) @ weight.astype(int).T)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
def test_float(rows, dtype):
    """bfloat16 weights: as exact as float32, not as a product of bfloat16 numbers."""
    h = RNG.normal(size=(*rows, 256)).astype(np.float32)
    weight = jnp.asarray(RNG.normal(size=(33, 256)), dtype)
    product = jax.jit(matmul)(h, weight)
    assert product.dtype == jnp.float32
    right = h.astype(np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(product, right, atol=3e-5)
    rounded = np.asarray(jnp.asarray(h, jnp.bfloat16), np.float64)
    assert np.abs(rounded @ np.asarray(weight, np.float64).T - right).max() > 1e-2


def test_bfloat16_keeps_what_is_not_finite():
    h = jnp.array([[np.inf, 1.0], [np.nan, 1.0]], jnp.float32)
    assert not np.isfinite(matmul(h, jnp.ones((2, 2), jnp.bfloat16))).any()


@pytest.mark.parametrize("bias", [False, True])
def test_dynamic(bias):
    h = RNG.normal(size=(4, 64)).astype(np.float32)
    h[2] = 0  # a scale of 0 / 127 would divide by zero
    weight = RNG.integers(-127, 128, (33, 64)).astype(np.int8)
    scale = RNG.uniform(0.01, 0.1, 33).astype(np.float32)
    added = RNG.normal(size=33).astype(np.float32) if bias else None
    linear = DynamicInt8Linear(
        jnp.asarray(weight), jnp.asarray(scale), jnp.asarray(added) if bias else None
    )
    steps = np.abs(h).max(axis=1) / np.float32(127)
    steps[2] = 1
    codes = np.rint(h / steps[:, None]).astype(int)
    right = (codes @ weight.T.astype(int)) * scale.astype(float) * steps[:, None]
    projected = linear.project(jnp.asarray(h))
    np.testing.assert_array_equal(projected.x, codes @ weight.T.astype(int))
    np.testing.assert_allclose(linear(jnp.asarray(h)), right + (added if bias else 0), rtol=1e-5)


def test_static_adds_the_integer_bias_first():
    h = RNG.normal(size=(4, 64)).astype(np.float32) * 3
    weight = RNG.integers(-127, 128, (33, 64)).astype(np.int8)
    scale = RNG.uniform(0.01, 0.1, 33).astype(np.float32)
    bias = RNG.integers(-5000, 5000, 33).astype(np.int32)
    linear = StaticInt8Linear(
        jnp.asarray(weight), jnp.float32(0.03), jnp.float32(-7), jnp.asarray(scale),
        jnp.asarray(bias),
    )  # fmt: skip
    codes = np.clip(np.rint(h / np.float32(0.03) + np.float32(-7)), -128, 127).astype(int)
    assert codes.min() == -128, "some inputs saturate"
    right = (codes @ weight.T.astype(int) + bias) * scale.astype(float)
    np.testing.assert_allclose(
        jax.jit(lambda linear, h: linear(h))(linear, jnp.asarray(h)), right, rtol=1e-6
    )


def test_float_bias():
    linear = FloatLinear(jnp.eye(3), jnp.array([1.0, 2, 3]))
    np.testing.assert_array_equal(linear(jnp.ones((1, 3))), [[2, 3, 4]])


def test_division_is_a_true_one():
    """Under jit too, where XLA would multiply by the reciprocal."""
    h = RNG.normal(size=(1, 4096)).astype(np.float32)
    for scale in (0.03, 0.1, 0.7):
        linear = StaticInt8Linear(
            jnp.eye(4096, dtype=jnp.int8), jnp.float32(scale), jnp.float32(0),
            jnp.ones(4096), None,
        )  # fmt: skip
        ties = np.float32(scale) * (RNG.integers(-100, 100, (1, 4096)) + 0.5).astype(np.float32)
        for values in (h, ties):
            codes = np.clip(np.rint(values / np.float32(scale)), -128, 127)
            result = jax.jit(lambda linear, h: linear(h))(linear, jnp.asarray(values))
            np.testing.assert_array_equal(result, codes)


def test_quantise_a_weight():
    weight = RNG.normal(size=(5, 64)).astype(np.float32)
    weight[3] = 0
    codes, scale = quantize_weight(jnp.asarray(weight))
    assert codes.dtype == jnp.int8
    assert np.abs(np.asarray(codes)).max() == 127
    np.testing.assert_allclose(codes * scale[:, None], weight, atol=np.abs(weight).max() / 254)
    assert not codes[3].any()
    assert scale[3] == 1
