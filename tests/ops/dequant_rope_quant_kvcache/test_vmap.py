"""vmap: every combination of mapped and unmapped arguments equals a Python loop, bit for bit."""

import functools
import random

import jax
import numpy as np
import pytest
from support import calls, golden_calls, hlo, oracle

from jax_kvcache import dequant_rope_quant_kvcache

B, S, Nq, Nkv, D, C2 = 2, 2, 2, 1, 4, 5
H = (Nq + 2 * Nkv) * D
SIZES = (2, 3)  # the outer and the inner mapped axis of nested vmaps
MODES = {  # mode: (cache_mode, C1, shape of indices)
    "contiguous": ("contiguous", B, (B,)),
    "more_blocks": ("contiguous", B + 1, (B,)),
    "page": ("page", 3, (B * S,)),
}
# Mapped parameters, few so that the cases share their compiled shapes
PARAMETERS = (
    (),
    ("scale_k", "weight_scale"),
    ("scale_k", "scale_v", "offset_k", "offset_v", "weight_scale", "bias"),
)
OPTIONALS = (
    (),
    ("offset_k", "offset_v", "activation_scale", "bias"),
)


@functools.cache
def arguments(mode, optionals):
    """Arrays [*SIZES, ...] of every argument."""
    rng = np.random.default_rng(0)
    _, C1, indices = MODES[mode]

    def normal(*shape):
        return rng.normal(size=(*SIZES, *shape))

    def codes(*shape):
        return rng.integers(-128, 128, (*SIZES, *shape)).astype(np.int8)

    values = dict(
        x=(normal(B, S, H) * 1000).astype(np.int32),
        cos=normal(B, S, 1, D).astype(np.float16),
        sin=normal(B, S, 1, D).astype(np.float16),
        k_cache=codes(C1, C2, Nkv, D),
        v_cache=codes(C1, C2, Nkv, D),
        # distinct slots in page mode, some out of range in every mode
        indices=np.argsort(normal(C1 * C2 + 2), axis=-1)[..., : indices[0]].astype(np.int32) - 1,
        scale_k=np.abs(normal(Nkv, D)).astype(np.float32) + 0.01,
        scale_v=np.abs(normal(Nkv, D)).astype(np.float32) + 0.01,
        weight_scale=np.abs(normal(H) / 1000).astype(np.float32) + 1e-5,
    )
    if mode != "page":
        values["indices"] %= C2 + 1
        values["indices"] -= 1
    if optionals:
        values |= dict(
            offset_k=normal(Nkv, D).astype(np.float32),
            offset_v=normal(Nkv, D).astype(np.float32),
            activation_scale=np.abs(normal(B, S)).astype(np.float32) + 0.1,
            bias=normal(H).astype(np.float32),
        )
    return values


@functools.cache
def loop(mode, optionals, mapped):
    """The oracle's results [*SIZES, ...], example by example."""
    values = arguments(mode, optionals)
    examples = []
    for i in np.ndindex(*SIZES):
        example = {
            name: value[
                tuple(n if name in level else 0 for n, level in zip(i, mapped, strict=True))
            ]
            for name, value in values.items()
        }
        examples.append(
            oracle.dequant_rope_quant_kvcache(**example, kv_output=True, cache_mode=MODES[mode][0])
        )
    return [np.stack(r).reshape(*SIZES, *r[0].shape) for r in zip(*examples, strict=True)]


def call(mode, kv_output, implementation):
    def f(arguments):
        return dequant_rope_quant_kvcache(
            **arguments,
            kv_output=kv_output,
            cache_mode=MODES[mode][0],
            implementation=implementation,
        )

    return f


def what_is_mapped(rng, seed, mode, optionals):
    """The arguments mapped by the outer and the inner vmap; none by the outer: there is one."""
    names = list(arguments(mode, optionals))
    per_example = ["x", "cos", "sin", "k_cache", "v_cache", "indices", "activation_scale"]
    pattern = rng.randrange(len(PARAMETERS))
    mapped = []
    for level in range(2):
        tokens = {n for n in per_example if n in names and rng.random() < 0.5}
        parameters = {n for n in PARAMETERS[pattern] if n in names}
        if level == 0 and seed % 4:  # one level only
            mapped.append(frozenset())
        else:
            mapped.append(frozenset((tokens | parameters) or {"x"}))
    return tuple(mapped), pattern


def check(seed, mode, optionals, implementation):
    """One combination: what is mapped at which level, from where to where, and jit's place."""
    rng = random.Random(f"{mode} {seed}")
    mapped, pattern = what_is_mapped(rng, seed, mode, optionals)
    kv_output = pattern != 1
    f = call(mode, kv_output, implementation)
    values = arguments(mode, optionals)
    expected = loop(mode, optionals, mapped)
    depth = sum(map(bool, mapped))
    elsewhere = seed % 3 == 0  # mapped axes anywhere, not only in front
    out_axes = [rng.randrange(-1, 3) if elsewhere else 0 for _ in range(depth)]
    arrays, in_axes = {}, [{} for _ in range(depth)]
    for name, value in values.items():
        here = [name in names for names in mapped]
        value = value[tuple(slice(None) if m else 0 for m in here)]  # mapped axes lead
        rank = value.ndim
        for level in reversed(range(depth)):  # move them from the innermost out
            if not here[level - depth]:
                in_axes[level][name] = None
                continue
            outside = sum(here[: level - depth]) if level else 0
            axis = in_axes[level][name] = rng.randrange(rank - outside) if elsewhere else 0
            value = np.moveaxis(value, outside, axis + outside)
        arrays[name] = value
    for level in reversed(range(depth)):
        if rng.random() < 0.03:
            f = jax.jit(f)
        f = jax.vmap(f, in_axes=(in_axes[level],), out_axes=out_axes[level])
    if rng.random() < 0.03:
        f = jax.jit(f)
    for name, actual, want in zip(golden_calls.RESULTS, f(arrays), expected, strict=True):
        if name in "kv" and not kv_output:
            assert actual is None
            continue
        actual = np.asarray(actual)
        for level in range(depth):  # outermost first: each step uncovers the next one's axis
            actual = np.moveaxis(actual, out_axes[level] % (actual.ndim - level) + level, level)
        want = want if depth == 2 else want[0]
        oracle.assert_same_bits(actual, want, f"{name}, seed {seed}, {mapped}")


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("optionals", OPTIONALS, ids=["plain", "optionals"])
@pytest.mark.parametrize("mode", MODES)
def test_equals_a_loop(mode, optionals, implementation):
    """Twenty combinations each; one test and not twenty, because they share compiled shapes."""
    for seed in range(20):
        check(seed, mode, optionals, implementation)


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("mode", MODES)
def test_mapped_caches_stay_in_place(mode, implementation):
    """One call with one more group dimension: no loop, no copy, the caches donated."""
    steps, rows = 3, 4096
    _, C1, indices = MODES[mode]
    shape = dict(B=B, S=S, Nq=Nq, Nkv=Nkv, D=D, C1=C1, C2=rows)
    one = calls.arguments(**shape, cache_mode=MODES[mode][0])
    one["indices"] = jax.ShapeDtypeStruct(indices, np.int32)
    shared = {name: one.pop(name) for name in ("scale_k", "scale_v", "weight_scale")}
    mapped = {n: jax.ShapeDtypeStruct((steps, *a.shape), a.dtype) for n, a in one.items()}
    f = call(mode, True, implementation)

    def step(k_cache, v_cache, mapped, shared):
        caches = {"k_cache": k_cache, "v_cache": v_cache}
        return jax.vmap(lambda m: f(m | shared))(mapped | caches)

    caches = mapped.pop("k_cache"), mapped.pop("v_cache")
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*caches, mapped, shared)
    compiled = lowered.compile()
    hlo.assert_in_place(compiled, steps * C1 * rows * Nkv * D)
    text = compiled.as_text()
    assert "while" not in text
    target = 'custom_call_target="dequant_rope_quant_kvcache"'
    assert text.count(target) == (implementation == "ffi")


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
def test_spmd_axis_name(implementation):
    values = {n: v[0] for n, v in arguments("contiguous", OPTIONALS[1]).items()}
    f = call("contiguous", True, implementation)
    mesh = jax.make_mesh((3,), ("steps",), (jax.sharding.AxisType.Auto,))
    places = {n: jax.NamedSharding(mesh, jax.P("steps")) for n in values}
    step = jax.jit(jax.vmap(f, spmd_axis_name="steps"), in_shardings=(places,))
    everything = frozenset(values)
    expected = loop("contiguous", OPTIONALS[1], (frozenset(), everything))
    result = step(values)
    assert result.k_cache.sharding.spec[0] == "steps"
    for name, actual, want in zip(golden_calls.RESULTS, result, expected, strict=True):
        oracle.assert_same_bits(actual, want[0], name)
