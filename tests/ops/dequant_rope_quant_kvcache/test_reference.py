"""Each stage of the reference under jit against NumPy on wide random data, bit for bit.

XLA:CPU changes bits in a good share of these values when a product may be fused or a division
turned into a multiplication, so each test fails without its guard in the reference.
"""

import jax
import ml_dtypes
import numpy as np
from support import oracle
from support.internals import reference
from support.results import assert_same_bits

F32 = np.float32


def test_rope_float32_products_are_not_fused():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 8, 128)).astype(F32)
    cos, sin = rng.standard_normal((2, 64, 128)).astype(F32)
    expected = np.stack([oracle.rotate(*token) for token in zip(x, cos, sin, strict=True)])
    halves = jax.jit(reference.apply_rope)(x, cos, sin)
    assert_same_bits(np.concatenate(halves, axis=-1), expected)


def test_dequantize_products_are_not_fused():
    rng = np.random.default_rng(1)
    x = rng.integers(-(2**31), 2**31, (64, 512)).astype(np.int32)
    weight_scale, bias = rng.uniform(1e-9, 1e-8, (2, 512)).astype(F32)
    activation_scale = rng.uniform(0.5, 2, 64).astype(F32)
    expected = x.astype(F32) * weight_scale * activation_scale[:, None] + bias
    actual = jax.jit(reference.dequantize)(x, weight_scale, activation_scale, bias)
    assert_same_bits(actual, expected)


def test_uniform_scales_are_not_multiplied_first():
    """XLA reassociates a product with two scalars, which two uniform constant arrays become."""
    x = np.random.default_rng(2).integers(-(2**31), 2**31, (64, 512)).astype(np.int32)
    weight_scale, activation_scale = np.full(512, 3e-5, F32), np.full(64, 0.7, F32)
    expected = x.astype(F32) * weight_scale * activation_scale[:, None]
    actual = jax.jit(lambda x: reference.dequantize(x, weight_scale, activation_scale, None))(x)
    assert_same_bits(actual, expected)


def test_quotients_are_divided():
    """Codes at half steps flip when value / scale is computed as value * (1 / scale)."""
    rng = np.random.default_rng(3)
    scale = rng.uniform(0.01, 0.1, (8, 64)).astype(F32)
    codes = rng.integers(-100, 100, (256, 8, 64)) + 0.5
    value = (codes * scale).astype(F32)
    expected = oracle.quantize(value, scale, None)
    assert np.any(np.rint(value * (1 / scale)) != np.rint(value / scale))
    np.testing.assert_array_equal(
        jax.jit(reference.quantize_int8, static_argnums=2)(value, scale, None), expected
    )
    np.testing.assert_array_equal(
        jax.jit(lambda v: reference.quantize_int8(v, scale, None))(value), expected
    )


def test_constant_quotients_are_divided():
    """Constants of 16 bits have zeros for their last bits, which must not make them all alike."""
    value = np.random.default_rng(4).uniform(-5, 5, (256, 8, 64)).astype(ml_dtypes.bfloat16)
    codes = np.rint(value[0].astype(F32) / 0.04) + F32(0.5)
    scale = (value[0].astype(F32) / codes).astype(F32)
    value = np.broadcast_to(value[:1], value.shape)
    expected = oracle.quantize(value.astype(F32), scale, None)
    assert np.any(np.rint(value.astype(F32) * (1 / scale)) != expected)
    constant = jax.jit(lambda scale: reference.quantize_int8(value, scale, None))
    np.testing.assert_array_equal(constant(scale), expected)
