"""The public functions that are no operators take sharded arrays in explicit mode."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from support import explicit_calls, public_calls

# The operators' meshes have tests of their own, in tests/mesh.
OPERATORS = ("dequant_rope_quant_kvcache", "explain", "decode_attention")
CALLS = {
    name: call
    for name, call in public_calls.calls().items()
    if not name.startswith(OPERATORS) and ".create" not in name and ".update" not in name
}


@pytest.mark.parametrize("name", CALLS)
def test_sharded_arrays(name):
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (AxisType.Explicit,) * 2)
    arrays = explicit_calls.placed(mesh)
    with jax.set_mesh(mesh):
        got = jax.block_until_ready(jax.jit(CALLS[name])(arrays))
    want = CALLS[name](public_calls.arrays())
    for actual, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        actual, expected = (np.asarray(a).astype(np.float64) for a in (actual, expected))
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-6)
