"""x as (q, k, v) in every mode, and the order of one x's columns inside jax.shard_map."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import calls
from support.results import assert_results

from jax_kvcache import (
    KVCache,
    dequant_rope_quant_kvcache,
    explain,
    interleave_qkv_for_tensor_parallel,
)

B, Nq, Nkv, D, C2 = 4, 4, 2, 8, 8
SPLITS = (Nq * D, Nkv * D, Nkv * D)
COLUMNS = ("x", "weight_scale", "bias")
ONE_TOKEN = ("q", "k_cache", "v_cache")


def whole():
    call = calls.drawn(3, B=B, S=1, Nq=Nq, Nkv=Nkv, D=D, C1=B, C2=C2)
    bias = np.linspace(-9, 9, sum(SPLITS), dtype=np.float32)
    return call | {"indices": np.array([0, 7, -1, 3], np.int32), "bias": bias}


def changed(call, function):
    return call | {name: function(call[name]) for name in COLUMNS}


def apart(call):
    return changed(call, lambda a: tuple(np.split(a, np.cumsum(SPLITS)[:2], axis=-1)))


def interleaved(call, shards=2):
    return changed(call, lambda a: interleave_qkv_for_tensor_parallel(a, SPLITS, shards))


def results(result):
    return result.q, result.k_cache, result.v_cache


def expected():
    return results(dequant_rope_quant_kvcache(**whole()))


def over(call, mesh, x_axis="tp", scales="tp"):
    """Where each argument lies: sequences over dp, heads and columns over tp."""
    specs = {name: P("dp") for name in call}
    specs |= {"k_cache": P("dp", None, "tp"), "v_cache": P("dp", None, "tp")}
    specs |= {"scale_k": P(scales), "scale_v": P(scales), "x": P("dp", None, x_axis)}
    specs |= {"weight_scale": P(x_axis), "bias": P(x_axis)}
    return {name: specs[name] for name in call}


def in_shard_map(call, check_vma=True, **more):
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (AxisType.Auto,) * 2)
    cache = P("dp", None, "tp")

    def one(call):
        return results(dequant_rope_quant_kvcache(**call, **more))

    step = jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(over(call, mesh),),
        out_specs=(cache, cache, cache),
        check_vma=check_vma,
    )
    return jax.jit(step)(call)


@pytest.mark.parametrize("function", [lambda f: f, jax.jit])
def test_apart_on_one_device(function):
    step = function(lambda call: results(dequant_rope_quant_kvcache(**call)))
    assert_results(step(apart(whole())), expected(), names=ONE_TOKEN)


@pytest.mark.parametrize("check_vma", [True, False])
def test_apart_in_shard_map(check_vma):
    """Equal parts of q, of k and of v are the columns of each device's heads."""
    assert_results(in_shard_map(apart(whole()), check_vma), expected(), names=ONE_TOKEN)


@pytest.mark.parametrize("x_axis", [None, "tp"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_apart_in_automatic_and_explicit_mode(kind, x_axis):
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (kind,) * 2)
    call = apart(whole())
    specs = over(call, mesh, x_axis)
    with jax.set_mesh(mesh):
        call = {
            name: jax.tree.map(
                lambda a, s=specs[name]: jax.device_put(a, NamedSharding(mesh, s)), v
            )
            for name, v in call.items()
        }
        result = jax.jit(lambda call: results(dequant_rope_quant_kvcache(**call)))(call)
    assert_results(result, expected(), names=ONE_TOKEN)


def test_apart_in_a_cache_and_in_explain():
    call = whole()
    scales = {name: call[name] for name in ("scale_k", "scale_v")}
    tokens = {name: call[name] for name in (*COLUMNS, "cos", "sin")}
    tokens["positions"] = call["indices"]
    cache = KVCache.create(B, C2, Nkv, D, **scales)
    want_q, want = cache.update(**tokens)
    q, after = cache.update(**apart(tokens))
    np.testing.assert_array_equal(q, want_q)
    jax.tree.map(np.testing.assert_array_equal, after, want)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), apart(call))
    assert explain(**shapes) == explain(**call)


def test_the_right_order_said():
    assert_results(in_shard_map(interleaved(whole()), qkv_shards=2), expected(), names=ONE_TOKEN)


def test_the_right_order_said_without_jaxs_checks():
    results = in_shard_map(interleaved(whole()), check_vma=False, qkv_shards=2)
    assert_results(results, expected(), names=ONE_TOKEN)


@pytest.mark.parametrize("order", ["plain", "interleaved"])
def test_no_order_said_warns(order):
    call = whole() if order == "plain" else interleaved(whole())
    message = (
        r"heads over \{'tp': 2\}, each device needs .* `qkv_shards=2`, or pass `x`, .*\(q, k, v"
    )
    with pytest.warns(UserWarning, match=message) as warned:
        result = in_shard_map(call)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    if order == "interleaved":
        assert_results(result, expected(), names=ONE_TOKEN)


@pytest.mark.parametrize("shards", [1, 3, 4])
def test_the_wrong_order_said(shards):
    message = rf"`qkv_shards` must be 2 inside .*over \{{'tp': 2\}}, got {shards}. Put the columns"
    with pytest.raises(ValueError, match=message):
        in_shard_map(whole(), qkv_shards=shards)


def test_the_wrong_order_said_without_jaxs_checks():
    with pytest.raises(ValueError, match=r"must be 1 or 2 or 4 inside .*got 3"):
        in_shard_map(whole(), check_vma=False, qkv_shards=3)


def test_interleaved_outside_shard_map():
    mesh = jax.make_mesh((1, 2), ("dp", "tp"), (AxisType.Explicit,) * 2)
    for on in (jax.set_mesh(mesh), warnings.catch_warnings()):
        with on, pytest.raises(ValueError, match=r"1 or None outside .*plain order.* got 2. Undo"):
            dequant_rope_quant_kvcache(**interleaved(whole()), qkv_shards=2)


def cache_in_shard_map(call, total, check_vma, scales="tp", **more):
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (AxisType.Auto,) * 2)
    cache = KVCache.create(
        B, C2, Nkv, D, scale_k=call["scale_k"], scale_v=call["scale_v"], num_q_heads=total
    )
    codes = P("dp", None, "tp")
    spec = KVCache(codes, codes, P(scales), P(scales), None, None, None, total)
    tokens = {name: call[name] for name in (*COLUMNS, "cos", "sin")}

    def one(cache, tokens, positions):
        return cache.update(**tokens, positions=positions, **more)

    step = jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(spec, over(tokens, mesh), P("dp")),
        out_specs=(codes, spec),
        check_vma=check_vma,
    )
    return jax.jit(step)(cache, tokens, call["indices"])


def test_a_cache_that_knows_all_query_heads():
    """Its number is that of all devices together, and tells that they share the heads."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q, _ = cache_in_shard_map(interleaved(whole()), Nq, False, qkv_shards=2)
        cache_in_shard_map(interleaved(whole()), None, False)
    np.testing.assert_array_equal(q, expected()[0])
    with pytest.warns(UserWarning, match="nothing says that `x` has them"):
        cache_in_shard_map(interleaved(whole()), Nq, False)
    with pytest.raises(
        ValueError, match=r"Nq = `num_q_heads` = 5, or a device's share over .*Nq = 2"
    ):
        cache_in_shard_map(interleaved(whole()), 5, True, qkv_shards=2)


def test_data_parallel_parameters_are_no_heads():
    """A parameter that varies over dp warns, unless the cache knows all query heads."""
    mesh = jax.make_mesh((2,), ("dp",), (AxisType.Auto,))
    call = whole()
    cache = KVCache.create(
        B, C2, Nkv, D, scale_k=call["scale_k"], scale_v=call["scale_v"], num_q_heads=Nq
    )

    def one(call, x, positions):
        own = jax.tree.map(lambda a: jax.lax.pcast(a, "dp", to="varying"), cache)
        own = jax.tree.map(lambda a: a[:2] if a.ndim == 4 else a, own)
        return own.update(x, call["cos"], call["sin"], positions, qkv_shards=1,
                          weight_scale=whole()["weight_scale"])[0]  # fmt: skip

    tables = {name: jnp.asarray(call[name]) for name in ("cos", "sin")}
    step = jax.shard_map(one, mesh=mesh, in_specs=P("dp"), out_specs=P("dp"))
    q = jax.jit(step)(tables, call["x"], call["indices"])
    want = cache.update(call["x"], call["cos"], call["sin"], call["indices"],
                        weight_scale=call["weight_scale"])[0]  # fmt: skip
    np.testing.assert_array_equal(q, want)
