"""vmap, scan and shard_map composed over a mesh in JAX's three modes: same bits, in place."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import hlo, oracle
from support.results import OF_A_STEP, assert_results, assert_same_bits

from jax_kvcache import dequant_rope_quant_kvcache, interleave_qkv_for_tensor_parallel

STEPS, V, B, Nq, Nkv, D, C2 = 2, 2, 2, 4, 2, 8, 4096
H = (Nq + 2 * Nkv) * D
CACHE = P("dp", None, None, "tp", None)  # V caches over dp, their heads over tp
TOKENS = P(None, "dp")


@functools.cache
def inputs():
    """caches [V, B, C2, Nkv, D], per step and cache one token per sequence, parameters."""
    rng = np.random.default_rng(11)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    caches = tuple(rng.integers(-128, 128, (V, B, C2, Nkv, D)).astype(np.int8) for _ in "kv")
    steps = dict(
        x=rng.integers(-4000, 4000, (STEPS, V, B, H)).astype(np.int32),
        cos=normal(STEPS, V, B, D).astype(np.float16),
        sin=normal(STEPS, V, B, D).astype(np.float16),
        indices=np.array([[[0, 9], [-1, C2 - 1]], [[C2, 5], [3, 3]]], np.int32),
    )
    params = dict(
        scale_k=np.abs(normal(V, Nkv, D)) + 0.01,  # each cache has its own
        scale_v=np.abs(normal(Nkv, D)) + 0.01,
        weight_scale=np.abs(normal(H)) / 1000,
    )
    return caches, steps, params


def own_params(params, v):
    return params | {"scale_k": params["scale_k"][v]}


@functools.cache
def expected():
    caches, steps, params = inputs()
    q, after = [], []
    for v in range(V):
        own = [c[v] for c in caches]
        for i in range(STEPS):
            step = {name: value[i, v] for name, value in steps.items()}
            first, _, _, *own = oracle.dequant_rope_quant_kvcache(
                **step, **own_params(params, v), k_cache=own[0], v_cache=own[1]
            )
            q.append(first)
        after.append(own)
    q = np.stack(q).reshape(V, STEPS, B, Nq, D).swapaxes(0, 1)
    return q, *(np.stack(c) for c in zip(*after, strict=True))


def update(implementation, caches, step, params, qkv_shards=None):
    result = dequant_rope_quant_kvcache(
        **step, **params, k_cache=caches[0], v_cache=caches[1], implementation=implementation,
        qkv_shards=qkv_shards,
    )  # fmt: skip
    return (result.k_cache, result.v_cache), result.q


PARAM_AXES = {"scale_k": 0, "scale_v": None, "weight_scale": None}


def scan_of_vmap(one, caches, steps, params):
    def body(caches, step):
        return jax.vmap(one, in_axes=(0, 0, PARAM_AXES))(caches, step, params)

    caches, q = lax.scan(body, caches, steps)
    return q, *caches


def vmap_of_scan(one, caches, steps, params):
    def all_steps(caches, steps, params):
        return lax.scan(lambda c, s: one(c, s, params), caches, steps)

    mapped = jax.vmap(all_steps, in_axes=(0, 1, PARAM_AXES), out_axes=(0, 1))
    caches, q = mapped(caches, steps, params)
    return q, *caches


def over_mesh(function, mesh):
    """`function` of caches, steps, params as one device's part; x interleaved by the caller."""
    tokens = dict.fromkeys(("cos", "sin", "indices"), TOKENS) | {"x": P(None, "dp", None, "tp")}
    params = {"scale_k": P("dp", "tp"), "scale_v": P("tp"), "weight_scale": P("tp")}
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=((CACHE, CACHE), tokens, params),
        out_specs=(P(None, "dp", None, "tp"), CACHE, CACHE),
    )


def scan_of_shard_map(mesh, one, caches, steps, params):
    def body(caches, step):
        one_step = jax.tree.map(lambda a: a[None], step)
        whole = over_mesh(functools.partial(scan_of_vmap, one), mesh)
        q, *caches = whole(caches, one_step, params)
        return tuple(caches), q[0]

    caches, q = lax.scan(body, caches, steps)
    return q, *caches


def run(function, mesh, columns, q_spec=None):
    caches, steps, params = inputs()
    where_x = P(None, "dp", None, columns)

    def place(value, spec):
        return jax.device_put(value, NamedSharding(mesh, spec))

    if columns:
        for name, source in (("x", steps), ("weight_scale", params)):
            source = source | {name: interleave(source[name], mesh.shape["tp"])}
            steps, params = (source, params) if name == "x" else (steps, source)
    caches = tuple(place(c, CACHE) for c in caches)
    steps = {name: place(v, where_x if name == "x" else TOKENS) for name, v in steps.items()}
    where = {"scale_k": P("dp", "tp"), "scale_v": P("tp"), "weight_scale": P(columns)}
    params = {name: place(v, where[name]) for name, v in params.items()}
    where = None if q_spec is None else (NamedSharding(mesh, q_spec), *(c.sharding for c in caches))
    step = jax.jit(function, donate_argnums=0, out_shardings=where)
    compiled = step.lower(caches, steps, params).compile()
    assert hlo.collective_bytes(compiled.as_text()) == 0
    shard = caches[0].sharding.shard_shape(caches[0].shape)
    hlo.assert_in_place(compiled, math.prod(shard))
    results = compiled(caches, steps, params)
    assert_results(results, expected(), names=OF_A_STEP)
    assert results[1].sharding.shard_shape(caches[0].shape) == shard


def interleave(value, shards):
    splits = (Nq * D, Nkv * D, Nkv * D)
    return np.asarray(interleave_qkv_for_tensor_parallel(value, splits, shards))


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("loop", [scan_of_vmap, vmap_of_scan])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_global(kind, loop, implementation):
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (kind,) * 2)
    one = functools.partial(update, implementation)
    q_spec = P(None, "dp", None, "tp") if kind == AxisType.Auto else None
    run(functools.partial(loop, one), mesh, None, q_spec)


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("loop", [scan_of_vmap, vmap_of_scan, scan_of_shard_map])
def test_manual(loop, implementation):
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (AxisType.Auto,) * 2)
    one = functools.partial(update, implementation, qkv_shards=2)
    if loop is scan_of_shard_map:
        function = functools.partial(loop, mesh, one)
    else:
        function = over_mesh(functools.partial(loop, one), mesh)
    run(function, mesh, columns="tp")


def test_vmap_of_shard_map():
    """The mapped axis is a group dimension in front of each device's own."""
    mesh = jax.make_mesh((2,), ("dp",), (AxisType.Auto,))
    caches, steps, params = inputs()

    def one_device(caches, step, scale_k):
        return update(None, caches, step, params | {"scale_k": scale_k})

    specs = (P("dp"), P("dp"), P())
    whole = jax.shard_map(one_device, mesh=mesh, in_specs=specs, out_specs=P("dp"))
    step = {name: value[0] for name, value in steps.items()}
    caches = jax.tree.map(jnp.asarray, caches)
    caches, q = jax.jit(jax.vmap(whole))(caches, step, params["scale_k"])
    for v in range(V):
        want = oracle.dequant_rope_quant_kvcache(
            **{name: value[v] for name, value in step.items()}, **own_params(params, v),
            k_cache=inputs()[0][0][v], v_cache=inputs()[0][1][v],
        )  # fmt: skip
        actual = [np.asarray(a)[v] for a in (q, *caches)]
        assert_results(actual, (want[0], *want[3:]), f"example {v}", OF_A_STEP)


def test_unmapped_cache_in_explicit_mode():
    """Each example's copy of an unmapped cache lies where the example's tokens are."""
    mesh = jax.make_mesh((2,), ("dp",), (AxisType.Explicit,))
    caches, steps, params = inputs()
    step = {n: jax.device_put(v[0], NamedSharding(mesh, P("dp"))) for n, v in steps.items()}
    one = functools.partial(update, "xla", params=own_params(params, 0))
    with jax.set_mesh(mesh):
        function = jax.jit(jax.vmap(one, in_axes=(None, 0)))
        own = tuple(jnp.asarray(c[0]) for c in caches)
        compiled = function.lower(own, step).compile()
        (k_cache, _), _ = function(own, step)
    assert jax.typeof(k_cache).sharding.spec[0] == "dp"
    assert hlo.collective_bytes(compiled.as_text()) == 0
    for v in range(V):
        want = oracle.dequant_rope_quant_kvcache(
            **{name: value[0, v] for name, value in steps.items()}, **own_params(params, 0),
            k_cache=caches[0][0], v_cache=caches[1][0],
        )  # fmt: skip
        assert_same_bits(np.asarray(k_cache)[v], want[3])
