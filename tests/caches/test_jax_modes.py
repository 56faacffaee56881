"""Caches and attention give the same results under JAX's modes and on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import caches
from support.modes import MODES

from jax_kvcache import decode_attention

B = 4
KINDS = [("contiguous", caches.L), ("paged", None)]
TABLE = np.array([[0, 1], [2, 3], [4, 5], [6, 7]], np.int32)


def inputs(kind, layers):
    rng = np.random.default_rng(0)
    cache = caches.make(kind, rng, layers=layers, offsets=True, batch=B)
    call = caches.tokens(rng, batch=B)
    if kind == "contiguous":
        return cache, call | {"positions": np.array([0, 3, 5, 1], np.int32)}
    positions = np.tile(np.arange(3, 5, dtype=np.int32), (B, 1))
    return cache, call | {"positions": positions, "block_table": TABLE}


def step(cache, call):
    layer = None if cache.layers is None else 1
    q, cache = cache.update(**call, layer=layer)
    lengths = jnp.full((q.shape[0],), 5, jnp.int32)
    table = call.get("block_table")
    return decode_attention(q, cache, lengths, block_table=table, layer=layer), cache


@functools.cache
def expected(kind, layers):
    return jax.jit(step)(*inputs(kind, layers))


def check(actual, kind, layers):
    jax.tree.map(np.testing.assert_array_equal, actual[1], expected(kind, layers)[1])
    attended = [np.asarray(a[0], np.float32) for a in (actual, expected(kind, layers))]
    np.testing.assert_allclose(*attended, rtol=2**-7, atol=1e-3)  # bfloat16


@pytest.mark.parametrize(("kind", "layers"), KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_mode(mode, kind, layers):
    wrap = (lambda f: f) if mode == "no_jit" else jax.jit
    with MODES[mode]():
        actual = wrap(step)(*inputs(kind, layers))
    check(actual, kind, layers)


def specs(cache, call):
    """Sequences over the mesh for a contiguous cache, kv heads for a paged one."""
    lead = () if cache.layers is None else (None,)
    if "block_table" in call:
        codes, heads = P(*lead, None, None, "d", None), P(*lead, "d", None)
        return type(cache)(codes, codes, heads, heads, heads, heads, cache.layers), dict.fromkeys(
            call, P()
        )
    codes = P(*lead, "d")
    tokens = {n: P() if n in ("weight_scale", "bias") else P("d") for n in call}
    return type(cache)(codes, codes, P(), P(), P(), P(), cache.layers), tokens


@pytest.mark.parametrize(("kind", "layers"), KINDS)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_mesh(axis_type, kind, layers):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(axis_type,))
    arguments = inputs(kind, layers)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(
            lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)),
            arguments,
            specs(*arguments),
        )
        check(jax.jit(step)(*placed), kind, layers)


@pytest.mark.parametrize("layers", [None, caches.L])
def test_shard_map_with_its_checks(layers):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    arguments = inputs("contiguous", layers)
    in_specs = specs(*arguments)
    sharded = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=(P("d"), in_specs[0]))
    check(jax.jit(sharded)(*arguments), "contiguous", layers)
