"""vmap is one call with one more group dimension: in place, and sharded over a mesh axis."""

import functools

import jax
import numpy as np
import pytest
from support import calls, hlo, vmap_calls
from support.results import assert_results
from support.vmap_calls import MODES, B, Nq, S

from jax_kvcache import dequant_rope_quant_kvcache


def call(mode, implementation):
    operator = functools.partial(
        dequant_rope_quant_kvcache,
        kv_output=True,
        cache_mode=MODES[mode].cache_mode,
        implementation=implementation,
    )
    return lambda arguments: operator(**arguments)


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("mode", MODES)
def test_mapped_caches_stay_in_place(mode, implementation):
    """One call with one more group dimension: no loop, no copy, the caches donated."""
    steps, rows = 3, 4096
    cache_mode, C1, num_indices, Nkv, D = MODES[mode]
    shape = dict(B=B, S=S, Nq=Nq, Nkv=Nkv, D=D, C1=C1, C2=rows)
    one = calls.arguments(**shape, cache_mode=cache_mode)
    one["indices"] = jax.ShapeDtypeStruct((num_indices,), np.int32)
    shared = {name: one.pop(name) for name in ("scale_k", "scale_v", "weight_scale")}
    mapped = {n: jax.ShapeDtypeStruct((steps, *a.shape), a.dtype) for n, a in one.items()}
    f = call(mode, implementation)

    def step(k_cache, v_cache, mapped, shared):
        caches = {"k_cache": k_cache, "v_cache": v_cache}
        return jax.vmap(lambda m: f(m | shared))(mapped | caches)

    caches = mapped.pop("k_cache"), mapped.pop("v_cache")
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*caches, mapped, shared)
    compiled = lowered.compile()
    hlo.assert_in_place(compiled, steps * C1 * rows * Nkv * D)
    text = compiled.as_text()
    assert "while" not in text
    assert hlo.native_calls(text) == (implementation == "ffi")


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
def test_spmd_axis_name(implementation):
    values = {n: v[0] for n, v in vmap_calls.arguments("contiguous", "optionals").items()}
    f = call("contiguous", implementation)
    mesh = jax.make_mesh((3,), ("steps",), (jax.sharding.AxisType.Auto,))
    places = {n: jax.NamedSharding(mesh, jax.P("steps")) for n in values}
    step = jax.jit(jax.vmap(f, spmd_axis_name="steps"), in_shardings=(places,))
    everything = frozenset(values)
    expected = vmap_calls.loop("contiguous", "optionals", (frozenset(), everything))
    result = step(values)
    assert result.k_cache.sharding.spec[0] == "steps"
    assert_results(result, [want[0] for want in expected])


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
def test_vmap_over_nothing(implementation):
    one = calls.arguments(B=1, S=1, Nq=1, Nkv=1, D=2, C1=1, C2=8, x_dtype=np.float32)
    nothing = {name: np.zeros((0, *a.shape), a.dtype) for name, a in one.items()}
    result = jax.vmap(
        lambda call: dequant_rope_quant_kvcache(**call, implementation=implementation)
    )(nothing)
    assert result.q.shape == (0, 1, 1, 1, 2)
    assert result.k_cache.shape == (0, 1, 8, 1, 2)
