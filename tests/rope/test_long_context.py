"""The tables' angles at every position that a context can have, under jit, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_kvcache import rope_tables

RANDOM = np.random.default_rng(0).integers(0, 2**31, 2000)
POSITIONS = np.concatenate(
    [
        np.arange(300),
        2 ** np.arange(31),
        2 ** np.arange(31) - 1,
        2 ** np.arange(30) + 1,
        RANDOM % (2**24 + 2),
        RANDOM,
        -np.arange(100),
        [2**31 - 1, -(2**31) + 1],
    ]
).astype(np.int32)[None]


def exact(positions, head_dim, theta):
    """cos and sin in NumPy's longest float, [B, S, D/2]."""
    half = head_dim // 2
    frequencies = np.longdouble(theta) ** -(np.arange(half, dtype=np.longdouble) / half)
    angles = positions[..., None].astype(np.longdouble) * frequencies
    return np.cos(angles), np.sin(angles)


def tables(positions, head_dim, theta, dtype):
    jitted = jax.jit(lambda p: rope_tables(p, head_dim, theta, dtype))
    return [np.asarray(t)[:, :, 0, : head_dim // 2] for t in jitted(positions)]


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_float32(theta, head_dim):
    positions = POSITIONS[:, np.abs(POSITIONS[0].astype(np.int64)) <= 2**24 + 1]
    for table, true in zip(
        tables(positions, head_dim, theta, jnp.float32), exact(positions, head_dim, theta),
        strict=True,
    ):  # fmt: skip
        assert np.abs(table - true).max() < 2e-7


def test_positions_up_to_int32():
    """float64 frequencies leave 2**31 * 2**-53 radians, and the tables' own rounding."""
    for table, true in zip(
        tables(POSITIONS, 128, 1e4, jnp.float32), exact(POSITIONS, 128, 1e4), strict=True
    ):
        assert np.abs(table - true).max() < 1e-6


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bits_within_the_last_bit(dtype):
    positions = POSITIONS[:, np.abs(POSITIONS[0].astype(np.int64)) <= 2**24 + 1]
    for table, true in zip(
        tables(positions, 128, 1e4, dtype), exact(positions, 128, 1e4), strict=True
    ):
        right = true.astype(np.float64).astype(table.dtype)
        distance = np.abs(table.view(np.int16).astype(int) - right.view(np.int16).astype(int))
        assert distance.max() <= 1
        assert (distance > 0).mean() < 1e-3


@pytest.mark.parametrize("position", [2**18, 2**20, 2**24, 2**30])
def test_neighbours_differ(position):
    cos, sin = tables(np.array([[position, position + 1]], np.int32), 128, 1e4, jnp.float32)
    assert (cos[0, 0] != cos[0, 1]).any()
    assert (sin[0, 0] != sin[0, 1]).any()


def test_frequencies_above_one():
    """A factor below 1 makes them: a whole turn and more per position."""
    parameters = {"rope_type": "linear", "factor": 0.01}
    positions = np.array([[1, 5, 2**20 + 1]], np.int32)
    cos, _ = rope_tables(positions, 64, dtype=jnp.float32, rope_parameters=parameters)
    frequencies = 10000.0 ** -(np.arange(32) / 32) / 0.01
    expected = np.cos(positions[..., None].astype(np.longdouble) * frequencies)
    np.testing.assert_allclose(np.asarray(cos)[:, :, 0, :32], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.uint32, np.int16])
def test_other_integers(dtype):
    positions = np.array([[1, 5, 100]], dtype)
    expected = tables(positions.astype(np.int32), 8, 1e4, jnp.float32)
    for table, right in zip(tables(positions, 8, 1e4, jnp.float32), expected, strict=True):
        np.testing.assert_array_equal(table, right)


def test_unsigned_positions_do_not_wrap():
    """An array of JAX is not refused for its values, which may be traced."""
    positions = np.array([[2**31 - 1, 2**31 + 5, 2**32 - 1]], np.uint32)
    got = tables(jnp.asarray(positions), 64, 1e4, jnp.float32)
    np.testing.assert_allclose(got, exact(positions, 64, 1e4), atol=2e-6)


def test_x64_changes_nothing():
    expected = tables(POSITIONS, 8, 1e4, jnp.float32)
    with jax.enable_x64(True):
        for table, right in zip(tables(POSITIONS, 8, 1e4, jnp.float32), expected, strict=True):
            assert table.dtype == np.float32
            np.testing.assert_array_equal(table, right)
