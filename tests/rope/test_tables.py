"""The RoPE tables against a float64 computation, and what they refuse."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_kvcache import rope_tables


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 2**-8), (jnp.float16, 2**-11)]
)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_tables_are_the_angles_cosines_and_sines(dtype, tolerance, theta):
    positions = np.array([[0, 1, 2], [7, 100, 255]], np.int32)
    cos, sin = rope_tables(positions, 8, theta, dtype)
    angles = positions[..., None, None] * theta ** -(np.tile(np.arange(4), 2) / 4)
    assert cos.shape == sin.shape == (2, 3, 1, 8)
    assert cos.dtype == sin.dtype == dtype
    np.testing.assert_allclose(np.asarray(cos, np.float64), np.cos(angles), atol=tolerance)
    np.testing.assert_allclose(np.asarray(sin, np.float64), np.sin(angles), atol=tolerance)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros((1, 1), np.float32), 8), TypeError, "`positions` must be integers of shape"),
        ((np.zeros(3, np.int32), 8), TypeError, r"\[B, S\], got int32 of shape \[3\]"),
        ((np.zeros((1, 1), np.int32), 7), ValueError, "`head_dim` must be even and above 0, got 7"),
        (
            (np.zeros((1, 1), np.int32), 8, 0.0),
            ValueError,
            "`theta` must be a finite number above 0, got 0.0",
        ),
        (
            (np.zeros((1, 1), np.int32), 8, 1e4, jnp.int8),
            TypeError,
            "`dtype` must be float16, bfloat16 or float32, got int8",
        ),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        rope_tables(*arguments)
