"""The tables are the same under JAX's modes, traced or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.modes import MODES

from jax_kvcache import permute_for_rope, rope_tables

MORE = {
    "debug_nans": lambda: jax.debug_nans(True),
    "transfer_guard": lambda: jax.transfer_guard("disallow"),
    "checking_leaks": jax.checking_leaks,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "partial_rotary_factor": 0.5,
}


def tables(positions):
    return rope_tables(positions, 16, dtype=jnp.float32, rope_parameters=YARN)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("mode", [*MODES, *MORE])
def test_mode(mode, wrap):
    positions = jnp.array([[0, 3, -2, 2**24 + 1]], jnp.int32)
    expected, weight = tables(positions), jnp.arange(32)
    with (MODES | MORE)[mode]():
        got = jax.block_until_ready(wrap(tables)(positions))
    if mode != "transfer_guard":  # the order is an array on the host
        with (MODES | MORE)[mode]():
            permuted = permute_for_rope(weight, 16, interleaved=True).arrays
        assert permuted[:3].tolist() == [0, 2, 4]
    for table, right in zip(got, expected, strict=True):
        assert table.dtype == jnp.float32
        np.testing.assert_allclose(table, right, atol=1e-6)


def test_sharded_positions_in_explicit_mode():
    mesh = jax.make_mesh((2,), ("d",), (AxisType.Explicit,))
    positions = np.arange(8, dtype=np.int32).reshape(2, 4)
    expected = tables(positions)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(positions, NamedSharding(mesh, P("d")))
        for got in (tables(sharded), jax.jit(tables)(sharded)):
            for table, right in zip(got, expected, strict=True):
                assert jax.typeof(table).sharding.spec[0] == "d"
                np.testing.assert_array_equal(table, right)
