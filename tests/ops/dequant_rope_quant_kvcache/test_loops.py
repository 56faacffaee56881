"""Decoding in lax.scan, while_loop and cond: the caches in the carry, in place, the same bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import hlo, oracle
from support.internals import Operands, WriteOptions, primitive
from support.results import OF_A_STEP, assert_results

from jax_kvcache import dequant_rope_quant_kvcache

B, Nq, Nkv, D, C2, STEPS, L = 2, 2, 1, 16, 4096, 3, 3
H = (Nq + 2 * Nkv) * D
MODES = {"contiguous": B, "page": 3}  # mode: C1


@functools.cache
def inputs(cache_mode):
    rng = np.random.default_rng(3)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    steps = dict(  # one token per sequence and step
        x=rng.integers(-4000, 4000, (STEPS, B, H)).astype(np.int32),
        cos=normal(STEPS, B, D).astype(np.float16),
        sin=normal(STEPS, B, D).astype(np.float16),
        indices=np.array([[0, 9], [-1, C2 - 1], [C2, 5]], np.int32),
    )
    if cache_mode == "page":
        steps["indices"] = steps["indices"] * 3 - 1
    caches = tuple(
        rng.integers(-128, 128, (MODES[cache_mode], C2, Nkv, D)).astype(np.int8) for _ in "kv"
    )
    params = dict(
        scale_k=np.abs(normal(Nkv, D)) + 0.01,
        scale_v=np.abs(normal(Nkv, D)) + 0.01,
        weight_scale=np.abs(normal(H)) / 1000,
    )
    return caches, steps, params


@functools.cache
def expected(cache_mode):
    """q of every step, and the caches after the last."""
    caches, steps, params = inputs(cache_mode)
    qs = []
    for i in range(STEPS):
        step = {name: value[i] for name, value in steps.items()}
        q, _, _, *caches = oracle.dequant_rope_quant_kvcache(
            **step, **params, k_cache=caches[0], v_cache=caches[1], cache_mode=cache_mode
        )
        qs.append(q)
    return np.stack(qs), *caches


def update(caches, step, params, **options):
    result = dequant_rope_quant_kvcache(
        **step, **params, k_cache=caches[0], v_cache=caches[1], **options
    )
    return (result.k_cache, result.v_cache), result.q


def scan(caches, steps, params, **options):
    caches, q = lax.scan(lambda c, s: update(c, s, params, **options), caches, steps)
    return q, *caches


def while_loop(caches, steps, params, **options):
    def body(state):
        i, caches, qs = state
        step = jax.tree.map(lambda a: a[i], steps)
        caches, q = update(caches, step, params, **options)
        return i + 1, caches, qs.at[i].set(q)

    qs = jnp.zeros((STEPS, B, Nq, D), steps["cos"].dtype)
    _, caches, qs = lax.while_loop(lambda s: s[0] < STEPS, body, (0, caches, qs))
    return qs, *caches


def cond(caches, steps, params, **options):
    """Each step either writes, or (never, here) leaves the caches alone."""
    qs = []
    for i in range(STEPS):
        step = jax.tree.map(lambda a, i=i: a[i], steps)
        caches, q = lax.cond(
            step["x"][0, 0] > -(2**30),
            lambda caches, step=step: update(caches, step, params, **options),
            lambda caches: (caches, jnp.zeros((B, Nq, D), steps["cos"].dtype)),
            caches,
        )
        qs.append(q)
    return jnp.stack(qs), *caches


def fori_loop_of_cond(caches, steps, params, **options):
    def body(i, state):
        caches, qs = state
        step = jax.tree.map(lambda a: a[i], steps)
        caches, q = lax.cond(
            step["x"][0, 0] > -(2**30),
            lambda caches: update(caches, step, params, **options),
            lambda caches: (caches, jnp.zeros((B, Nq, D), steps["cos"].dtype)),
            caches,
        )
        return caches, qs.at[i].set(q)

    qs = jnp.zeros((STEPS, B, Nq, D), steps["cos"].dtype)
    caches, qs = lax.fori_loop(0, STEPS, body, (caches, qs))
    return qs, *caches


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("cache_mode", MODES)
@pytest.mark.parametrize("loop", [scan, while_loop, cond, fori_loop_of_cond])
def test_loop(loop, cache_mode, implementation):
    caches, steps, params = inputs(cache_mode)
    run = jax.jit(
        functools.partial(loop, cache_mode=cache_mode, implementation=implementation),
        donate_argnums=0,
    )
    compiled = run.lower(caches, steps, params).compile()
    hlo.assert_in_place(compiled, caches[0].size)
    results = compiled(jax.tree.map(jnp.asarray, caches), steps, params)
    assert_results(results, expected(cache_mode), names=OF_A_STEP)


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
def test_scan_over_layers(implementation):
    """One array [L, C1, C2, Nkv, D] for all layers, the layer's number folded into the slot."""
    caches, steps, params = inputs("page")
    capacity = MODES["page"] * C2
    absent = np.zeros(0, np.float32)
    layered = [jnp.stack([jnp.asarray(c) + i for i in range(L)]) for c in caches]

    def layer(caches, inputs):
        number, step = inputs
        slots = step["indices"]
        valid = (slots >= 0) & (slots < capacity)
        q, _, _, *caches = primitive.bind(
            Operands(
                step["x"], step["cos"], step["sin"], *caches,
                jnp.where(valid, slots + number * capacity, -1),
                params["scale_k"], params["scale_v"], absent, absent, params["weight_scale"],
                absent, absent,
            ),
            WriteOptions(implementation, kv_output=False, indices_mode="drop"),
        )  # fmt: skip
        return tuple(caches), q

    run = jax.jit(
        lambda caches, steps: lax.scan(layer, caches, (jnp.arange(L, dtype=jnp.int32), steps)),
        donate_argnums=0,
    )
    compiled = run.lower(tuple(layered), steps).compile()
    hlo.assert_in_place(compiled, layered[0].size)
    assert hlo.cache_copies(compiled.as_text(), layered[0][0].size) == []
    before = [np.asarray(c) for c in layered]
    after, q = compiled(tuple(layered), steps)
    for i in range(L):
        step = {name: value[i] for name, value in steps.items()}
        want = oracle.dequant_rope_quant_kvcache(
            **step, **params, k_cache=before[0][i], v_cache=before[1][i], cache_mode="page"
        )
        actual = (q[i], after[0][i], after[1][i])
        assert_results(actual, want[:1] + want[3:], f"layer {i}", OF_A_STEP)
