"""On a GPU: both operators over a mesh, in each mode, and exported, equal the calls without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support import hlo

from jax_kvcache import KVCache, decode_attention, disabled_export_checks

pytestmark = pytest.mark.cuda_device

B, S, Nq, Nkv, D, LENGTH = 2, 1, 8, 2, 64, 256
H = (Nq + 2 * Nkv) * D
SPECS = (PartitionSpec(None, None, "heads"), PartitionSpec())


def step(x, positions):
    """Both operators by default, which takes the native targets."""
    scale = np.full((Nkv, D), 0.3, np.float32)
    cache = KVCache.create(B, LENGTH, Nkv, D, scale_k=scale, scale_v=scale)
    angles = jnp.ones((B, S, 1, D), jnp.bfloat16)
    weight_scale = jnp.full(H, 0.01)
    q, cache = cache.update(x, angles, angles, positions, weight_scale=weight_scale)
    return decode_attention(q, cache, positions + 1), cache.k_cache


@pytest.fixture
def call():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(-999, 999, (B, S, H), np.int32)), jnp.array([3, 70], jnp.int32)


def assert_equal(results, call):
    for got, expected in zip(results, jax.jit(step)(*call), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_mesh(kind, call):
    mesh = jax.make_mesh((1,), ("heads",), (kind,))
    placed = [
        jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(call, SPECS, strict=True)
    ]
    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(*placed).compile()
        assert hlo.native_calls(compiled.as_text()) == 1
        assert_equal(compiled(*placed), call)


def test_shard_map(call):
    mesh = jax.make_mesh((1,), ("heads",), (AxisType.Auto,))
    whole = PartitionSpec()
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(whole, whole), out_specs=(whole, whole))
    assert_equal(jax.jit(mapped)(*call), call)


def test_export(call):
    exported = jax.export.export(
        jax.jit(step), platforms=("cpu", "cuda"), disabled_checks=disabled_export_checks()
    )
    again = jax.export.deserialize(exported(*call).serialize())
    assert_equal(again.call(*call), call)
