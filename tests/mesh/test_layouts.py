"""Automatic and explicit meshes: the same bits, in place, and no byte moved but those named."""

import functools
import math

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import calls, hlo, layouts, oracle
from support.results import assert_results

from jax_kvcache import dequant_rope_quant_kvcache

KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", layouts.MESHES, ids=str)
@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_layout(name, shape, kind, implementation):
    layout = layouts.LAYOUTS[name]
    mesh = jax.make_mesh(shape, ("dp", "tp"), (KINDS[kind],) * 2)
    arguments = layouts.placed(layout, mesh)
    step = jax.jit(
        functools.partial(
            dequant_rope_quant_kvcache,
            kv_output=True,
            cache_mode=layout.cache_mode,
            implementation=implementation,
        ),
        donate_argnames=("k_cache", "v_cache"),
        # in automatic mode what comes after says where q, k and v are wanted: here, where they are
        out_shardings=layouts.result_shardings(layout, mesh) if kind == "automatic" else None,
    )
    compiled = step.lower(**arguments).compile()
    text = compiled.as_text()
    assert hlo.collective_bytes(text) == layout.moved(*shape)
    cache = arguments["k_cache"]
    hlo.assert_in_place(compiled, math.prod(cache.sharding.shard_shape(cache.shape)))
    result = compiled(**arguments)
    assert cache.is_deleted()
    assert result.k_cache.sharding.is_equivalent_to(cache.sharding, 4)
    rows = layouts.result_shardings(layout, mesh).q
    assert result.q.sharding.is_equivalent_to(rows, 4)
    layouts.check(result, layout)


UNEQUAL = {
    "one step, sequences and tokens": ("contiguous", dict(B=4, S=1), P("dp"), P("dp", "tp")),
    "three steps": ("contiguous", dict(B=4, S=3), P("dp"), P("dp", "tp")),
    "six tokens": ("page", dict(B=6, S=1), P("tp"), P(("dp", "tp"))),
}


@pytest.mark.parametrize("wanted_of", ["x", "q"])
@pytest.mark.parametrize("name", UNEQUAL)
def test_tokens_in_unequal_parts(name, wanted_of):
    """A constraint may ask for it. What XLA adds to make them equal is no token."""
    mode, sizes, of_caches, of_tokens = UNEQUAL[name]
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (AxisType.Auto,) * 2)
    call = calls.drawn(
        0, Nq=4, Nkv=2, D=8, C1=6 if mode == "page" else 4, C2=8, cache_mode=mode, **sizes
    )
    call["indices"] = np.where(call["indices"] > 50, -1, call["indices"] % 6 + 1).astype(np.int32)
    expected = dequant_rope_quant_kvcache(**call, cache_mode=mode)

    def constrained(array):
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, of_tokens))

    def run(call):
        if wanted_of == "x":
            call = call | {"x": constrained(call["x"])}
        result = dequant_rope_quant_kvcache(**call, cache_mode=mode)
        return result._replace(q=constrained(result.q)) if wanted_of == "q" else result

    caches = {n: NamedSharding(mesh, of_caches) for n in ("k_cache", "v_cache")}
    placed = {
        n: jax.device_put(a, caches.get(n, NamedSharding(mesh, P()))) for n, a in call.items()
    }
    result = jax.jit(run)(placed)
    for name in ("q", "k_cache", "v_cache"):
        np.testing.assert_array_equal(getattr(result, name), getattr(expected, name))


@pytest.mark.parametrize("kind", KINDS)
def test_a_promise_holds_for_the_whole_cache(kind):
    """A shard is given slots of other shards, whatever was promised of the whole."""
    layout = layouts.LAYOUTS["blocks_heads"]
    mesh = jax.make_mesh((4, 1), ("dp", "tp"), (KINDS[kind],) * 2)
    slots = np.array([[0, 4095], [2048, 1], [600, 2000], [5, 1024]], np.int32)
    options = {"kv_output": True, "cache_mode": "page"}
    whole = layouts.arguments(layout.cache_mode, layout.C1) | {"indices": slots}
    expected = oracle.dequant_rope_quant_kvcache(**whole, **options)
    promised = functools.partial(
        dequant_rope_quant_kvcache,
        **options,
        indices_mode="promise_in_bounds",
        implementation="xla",
    )
    result = jax.jit(promised)(**layouts.placed(layout, mesh) | {"indices": slots})
    assert_results(result, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_eagerly(kind):
    layout = layouts.LAYOUTS["batch_heads"]
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (KINDS[kind],) * 2)
    result = dequant_rope_quant_kvcache(**layouts.placed(layout, mesh), kv_output=True)
    assert result.k_cache.sharding.is_equivalent_to(jax.NamedSharding(mesh, layout.cache), 4)
    layouts.check(result, layout)
