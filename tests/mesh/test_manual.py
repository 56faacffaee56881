"""jax.shard_map: each device calls the operator on its own arrays; the same bits, nothing moved."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support import hlo, layouts
from support.internals import compat
from support.layouts import Nkv, Nq

from jax_kvcache import (
    deinterleave_qkv_for_tensor_parallel,
    dequant_rope_quant_kvcache,
    interleave_qkv_for_tensor_parallel,
    local_slots,
)

SPLITS = (Nq * layouts.D, Nkv * layouts.D, Nkv * layouts.D)
COLUMNS = ("x", "weight_scale", "bias")


def interleaved(arguments, tp):
    return arguments | {
        name: np.asarray(interleave_qkv_for_tensor_parallel(arguments[name], SPLITS, tp))
        for name in COLUMNS
    }


def manual(layout, mesh, implementation):
    """The step of a whole mesh, from one device's step, and where its arguments lie."""
    where = layouts.specs(layout)

    def one_device(arguments):
        if layout.cache_mode == "page":
            C1, C2 = arguments["k_cache"].shape[:2]
            arguments["indices"] = local_slots(arguments["indices"], C1 * C2, "dp")
        result = dequant_rope_quant_kvcache(
            **arguments,
            kv_output=True,
            cache_mode=layout.cache_mode,
            implementation=implementation,
            qkv_shards=mesh.shape["tp"],
        )
        return tuple(result)

    rows = P(layout.tokens, None, layout.columns)
    return jax.shard_map(
        one_device,
        mesh=mesh,
        in_specs=(where,),
        out_specs=(rows, rows, rows, layout.cache, layout.cache),
    ), where


MANUAL = ("batch_heads_columns", "blocks_heads_columns")
LAYOUTS = layouts.LAYOUTS | {
    "blocks_heads_columns": layouts.Layout("page", 8, None, "tp", P("dp", None, "tp"))
}


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("shape", layouts.MESHES, ids=str)
@pytest.mark.parametrize("name", MANUAL)
def test_layout(name, shape, kind, implementation):
    layout = LAYOUTS[name]
    mesh = jax.make_mesh(shape, ("dp", "tp"), (kind,) * 2)
    whole_mesh, where = manual(layout, mesh, implementation)
    arguments = interleaved(layouts.arguments(layout.cache_mode, layout.C1), shape[1])
    arguments = {
        key: jax.device_put(value, jax.sharding.NamedSharding(mesh, where[key]))
        for key, value in arguments.items()
    }
    step = jax.jit(lambda caches, others: whole_mesh(caches | others), donate_argnums=0)
    caches = {key: arguments.pop(key) for key in ("k_cache", "v_cache")}
    compiled = step.lower(caches, arguments).compile()
    assert hlo.collective_bytes(compiled.as_text()) == 0
    cache = caches["k_cache"]
    hlo.assert_in_place(compiled, math.prod(cache.sharding.shard_shape(cache.shape)))
    layouts.check(compiled(caches, arguments), layout)


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
def test_explicit_axes_beside_manual_ones(implementation):
    layout = LAYOUTS["batch_heads"]
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (AxisType.Explicit,) * 2)
    where = {
        n: P(*["dp" if a == "dp" else None for a in s]) for n, s in layouts.specs(layout).items()
    }

    def one_device(arguments):
        return tuple(
            dequant_rope_quant_kvcache(**arguments, kv_output=True, implementation=implementation)
        )

    whole = jax.shard_map(
        one_device, mesh=mesh, in_specs=(where,), out_specs=P("dp"), axis_names={"dp"}
    )
    if not compat.nests_manual_axes():
        message = (
            r"cannot have explicit mesh axes \['tp'\] beside manual ones \['dp'\] with JAX 0.9"
        )
        with pytest.raises(NotImplementedError, match=message):
            jax.jit(whole)(layouts.placed(layout, mesh))
        return
    result = jax.jit(whole)(layouts.placed(layout, mesh))
    assert result[3].sharding.spec == P("dp", None, "tp", None)
    layouts.check(result, layout)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_interleave_and_back(shards):
    w = np.arange(2 * sum(SPLITS)).reshape(2, -1)
    there = np.asarray(interleave_qkv_for_tensor_parallel(w, SPLITS, shards))
    q, k, v = np.split(w, np.cumsum(SPLITS)[:2], axis=1)
    for i, part in enumerate(np.split(there, shards, axis=1)):
        own = [np.split(block, shards, axis=1)[i] for block in (q, k, v)]
        np.testing.assert_array_equal(part, np.concatenate(own, axis=1))
    back = deinterleave_qkv_for_tensor_parallel(there, SPLITS, shards)
    np.testing.assert_array_equal(back, w)


@pytest.mark.parametrize(
    "function", [interleave_qkv_for_tensor_parallel, deinterleave_qkv_for_tensor_parallel]
)
def test_interleave_refuses(function):
    with pytest.raises(
        ValueError, match=r"add up to 7, the last dimension of `w`, got \(4, 2, 2\)"
    ):
        function(np.zeros((3, 7)), (4, 2, 2), 2)
    with pytest.raises(ValueError, match=r"`shards` must divide each .* \(4, 2, 2\), got 4"):
        function(np.zeros(8), (4, 2, 2), 4)
    heads_of_8 = np.zeros(640), (512, 64, 64), 8  # or 4 kv heads of 16, which 8 devices would halve
    with pytest.raises(ValueError, match=r"got 8: .*each would get 8 columns of k, .* 64 q heads"):
        function(*heads_of_8)
    assert function(*heads_of_8, head_dim=8).shape == (640,)
    with pytest.raises(
        ValueError, match=r"\[32, 4, 4\] with `head_dim` = 16, got 8. Share .* 4 dev"
    ):
        function(*heads_of_8, head_dim=16)
    with pytest.raises(ValueError, match=r"`head_dim` must divide each of .*, got 48"):
        function(*heads_of_8, head_dim=48)


def test_interleaved_x_is_for_shard_map_only():
    """In automatic mode the operator is global: the plain order is right, the other one is not."""
    layout = LAYOUTS["batch_heads_columns"]
    mesh = jax.make_mesh((1, 4), ("dp", "tp"), (AxisType.Auto,) * 2)
    arguments = layouts.placed(layout, mesh)
    step = jax.jit(lambda a: dequant_rope_quant_kvcache(**a, kv_output=True))
    layouts.check(step(arguments), layout)
    wrong = interleaved(layouts.arguments(layout.cache_mode, layout.C1), 4)
    with pytest.raises(AssertionError):
        layouts.check(step(wrong), layout)
    with pytest.raises(ValueError, match="`qkv_shards` must be 1 or None outside"):
        dequant_rope_quant_kvcache(**wrong, qkv_shards=4)


def test_local_slots():
    mesh = jax.make_mesh((4,), ("dp",), (AxisType.Auto,))
    slots = np.array([0, 9, 10, 39, 40, -1, 2**31 - 1, -(2**31)], np.int32)
    own = jax.shard_map(
        lambda s: local_slots(s, 10, "dp")[None], mesh=mesh, in_specs=P(), out_specs=P("dp")
    )(slots)
    base = 10 * np.arange(4)[:, None]
    here = (slots >= base) & (slots < base + 10)
    np.testing.assert_array_equal(own, np.where(here, slots.astype(np.int64) - base, -1))
