"""Donated caches keep their device buffers over many steps; undonated callers keep their data."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import calls, hlo, oracle

from jax_kvcache import dequant_rope_quant_kvcache

STEPS = 100
SIZES = {"B": 2, "S": 1, "Nq": 2, "Nkv": 1, "D": 64, "C2": 128}
LAYOUTS = [("contiguous", 2), ("contiguous", 3), ("page", 2)]  # C1 == B, C1 > B, page

operator = functools.partial(dequant_rope_quant_kvcache, implementation="ffi")


def draw(cache_mode, C1, seed):
    return jax.tree.map(jnp.asarray, calls.drawn(seed, **SIZES, C1=C1, cache_mode=cache_mode))


def indices(cache_mode, step):
    rows = np.array([step, step - 5], np.int32)
    return rows + np.array([0, SIZES["C2"]], np.int32) if cache_mode == "page" else rows


@pytest.mark.ascend_device
@pytest.mark.parametrize(("cache_mode", "C1"), LAYOUTS)
def test_steps(cache_mode, C1, launches):
    call = draw(cache_mode, C1, 0)
    names = ("k_cache", "v_cache")
    caches = {name: call.pop(name) for name in names}
    expected = {name: np.asarray(cache) for name, cache in caches.items()}
    addresses = [cache.unsafe_buffer_pointer() for cache in caches.values()]
    step = jax.jit(functools.partial(operator, cache_mode=cache_mode), donate_argnames=names)
    text = step.lower(**call, **caches).compile().as_text()
    assert hlo.cache_copies(text, math.prod(caches["k_cache"].shape)) == []
    for i in range(STEPS):
        call["indices"] = indices(cache_mode, i).reshape(call["indices"].shape)
        old = caches
        result = step(**call, **caches)
        caches = {"k_cache": result.k_cache, "v_cache": result.v_cache}
        assert all(cache.is_deleted() for cache in old.values())
        assert [cache.unsafe_buffer_pointer() for cache in caches.values()] == addresses
        arrays = {k: np.asarray(v) for k, v in call.items()}
        wanted = oracle.dequant_rope_quant_kvcache(**arrays, **expected, cache_mode=cache_mode)
        expected = dict(zip(names, wanted[3:], strict=True))
    for name in names:
        np.testing.assert_array_equal(np.asarray(caches[name]), expected[name])
    assert launches() in (STEPS, None)


@pytest.mark.ascend_device
@pytest.mark.parametrize(("cache_mode", "C1"), LAYOUTS)
def test_scan(cache_mode, C1, launches):
    call = draw(cache_mode, C1, 1)
    names = ("k_cache", "v_cache")
    caches = [call.pop(name) for name in names]
    shape = call.pop("indices").shape
    elements = math.prod(caches[0].shape)

    def run(call, *caches):
        def step(caches, i):
            rows = jnp.asarray([0, SIZES["C2"]] if cache_mode == "page" else [0, 0]) + i
            named = dict(zip(names, caches, strict=True))
            result = operator(**call, **named, indices=rows.reshape(shape), cache_mode=cache_mode)
            return (result.k_cache, result.v_cache), result.q

        return jax.lax.scan(step, caches, jnp.arange(STEPS))

    compiled = jax.jit(run, donate_argnums=(1, 2)).lower(call, *caches).compile()
    assert hlo.cache_copies(compiled.as_text(), elements) == []
    before = [np.asarray(cache) for cache in caches]
    addresses = [cache.unsafe_buffer_pointer() for cache in caches]
    after, _ = compiled(call, *caches)
    assert [cache.unsafe_buffer_pointer() for cache in after] == addresses
    rows = np.arange(STEPS)
    for old, new in zip(before, after, strict=True):
        changed = (np.asarray(new) != old).any((2, 3)).reshape(old.shape[:2])
        assert changed[:2, rows].all()
        assert not changed[:, STEPS:].any()
    assert launches() in (STEPS, None)


@pytest.mark.ascend_device
def test_undonated_caches_are_unchanged(launches):
    call = draw("contiguous", 2, 2)
    call["indices"] = jnp.array([3, 4], jnp.int32)
    before = np.asarray(call["k_cache"])
    result = jax.jit(operator)(**call)
    assert result.k_cache.unsafe_buffer_pointer() != call["k_cache"].unsafe_buffer_pointer()
    np.testing.assert_array_equal(np.asarray(call["k_cache"]), before)
    assert (np.asarray(result.k_cache) != before).any()
    assert launches() in (1, None)
