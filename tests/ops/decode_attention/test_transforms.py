"""decode_attention under JAX's transforms, in its lowered programs, and what explain says of it."""

import dataclasses
import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import hlo
from support.attention import Call, in_float64

from jax_kvcache import (
    KVCache,
    PagedKVCache,
    decode_attention,
    disabled_export_checks,
    explain_attention,
)

each_implementation = pytest.mark.parametrize("implementation", ["xla", "ffi"])
each_kind = pytest.mark.parametrize("kind", ["contiguous", "paged"])
FIELDS = ["k_cache", "v_cache", "scale_k", "scale_v", "offset_k", "offset_v"]
TARGET = 'custom_call_target="decode_attention"'


def drawn(kind, seed=0, **sizes):
    q, cache, keywords = Call(kind=kind, **sizes).draw(seed)
    return q, cache, {name: value for name, value in keywords.items() if value is not None}


@each_implementation
@each_kind
@pytest.mark.parametrize("mapped", ["q", *FIELDS, "k_cache v_cache", " ".join(["q", *FIELDS])])
def test_vmap_equals_a_loop(mapped, kind, implementation):
    """Whatever differs between the examples; the rest is the first example's."""
    calls = [drawn(kind, seed, sinks=True, offset=3.0) for seed in range(3)]
    q, cache, keywords = calls[0]
    attend = functools.partial(decode_attention, **keywords, implementation=implementation)
    names = mapped.split()
    qs = [own if "q" in names else q for own, _, _ in calls]
    fields = [name for name in FIELDS if name in names]
    caches = [
        dataclasses.replace(cache, **{name: getattr(own, name) for name in fields})
        for _, own, _ in calls
    ]
    stacked = {name: jnp.stack([getattr(own, name) for own in caches]) for name in fields}
    axes = dataclasses.replace(cache, **dict.fromkeys(FIELDS) | dict.fromkeys(fields, 0))
    over = jax.vmap(attend, in_axes=(0 if "q" in names else None, axes))
    out = jax.jit(over)(jnp.stack(qs) if "q" in names else q, dataclasses.replace(cache, **stacked))
    for i in range(3):
        np.testing.assert_allclose(out[i], attend(qs[i], caches[i]), rtol=1e-5, atol=1e-6)


@each_implementation
@each_kind
def test_vmap_shares_an_unmapped_cache(kind, implementation):
    """No copy of it, and one native call."""
    q, cache, keywords = drawn(kind, B=2, rows=32768, block=32)
    attend = functools.partial(decode_attention, **keywords, implementation=implementation)
    qs = jnp.stack([q] * 4)
    compiled = jax.jit(jax.vmap(attend, in_axes=(0, None))).lower(qs, cache).compile()
    assert hlo.cache_copies(compiled.as_text(), cache.k_cache.size) == []
    assert compiled.memory_analysis().temp_size_in_bytes < cache.k_cache.size
    assert compiled.as_text().count(TARGET) == (implementation == "ffi")


@each_implementation
@each_kind
def test_nested_vmap(kind, implementation):
    calls = [[drawn(kind, 3 * i + j) for j in range(2)] for i in range(2)]
    keywords = calls[0][0][2] | {"implementation": implementation}
    attend = functools.partial(decode_attention, **keywords)
    qs = jnp.stack([jnp.stack([c[0] for c in row]) for row in calls])
    caches = [row[0][1] for row in calls]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
    inner = jax.vmap(attend, in_axes=(0, None))
    out = jax.jit(jax.vmap(inner))(qs, stacked)
    for i in range(2):
        for j in range(2):
            np.testing.assert_allclose(out[i, j], attend(qs[i, j], caches[i]), rtol=1e-5, atol=1e-6)


@each_kind
def test_derivatives_are_those_of_the_formula(kind):
    """Forward mode, by q, against differences of attention in float64; same result as without."""
    q, cache, keywords = drawn(kind, offset=3.0)
    tangent = jnp.asarray(np.random.default_rng(5).standard_normal(q.shape), jnp.float32)
    attend = functools.partial(decode_attention, cache=cache, **keywords)
    out, moved = jax.jit(lambda q, t: jax.jvp(attend, (q,), (t,)))(q, tangent)
    np.testing.assert_array_equal(out, attend(q))
    step = 1e-4
    after, before = (
        in_float64(
            np.asarray(q, np.float64) + sign * step * np.asarray(tangent), cache, **keywords
        )[0]
        for sign in (1, -1)
    )
    np.testing.assert_allclose(moved, (after - before) / (2 * step), rtol=1e-3, atol=1e-3)


@each_implementation
@each_kind
def test_no_sequences(kind, implementation):
    q, cache, keywords = drawn(kind)
    keywords = {n: a[:0] if np.ndim(a) else a for n, a in keywords.items()}
    out = decode_attention(q[:0], cache, **keywords, implementation=implementation)
    assert out.shape == (0, *q.shape[1:])


@each_implementation
def test_a_window_beyond_int32_sees_all_rows(implementation):
    q, cache, keywords = drawn("contiguous")
    keywords |= {"implementation": implementation}
    keywords["positions"] = np.full_like(keywords["positions"], 2**31 - 1)
    expected = decode_attention(q, cache, **keywords)
    for window in (2**31, 2**40):
        np.testing.assert_array_equal(
            decode_attention(q, cache, window=window, **keywords), expected
        )


def test_no_reverse_mode():
    q, cache, keywords = drawn("contiguous")
    attend = functools.partial(decode_attention, cache=cache, **keywords)
    for derivative in (jax.grad, lambda f: jax.jit(jax.grad(f))):
        with pytest.raises(NotImplementedError, match=r"decode_attention .* no reverse-mode"):
            derivative(lambda q: attend(q).sum())(q)
    alone = [jax.jvp(attend, (q,), (t,))[1] for t in (q, -2 * q)]
    together = jax.vmap(lambda t: jax.jvp(attend, (q,), (t,))[1])(jnp.stack([q, -2 * q]))
    np.testing.assert_allclose(together, jnp.stack(alone), rtol=1e-5, atol=1e-6)


def test_derivative_by_the_scales():
    q, cache, keywords = drawn("contiguous")

    def attend(scale_v):
        changed = KVCache(cache.k_cache, cache.v_cache, cache.scale_k, scale_v, None, None, None)
        return decode_attention(q, changed, **keywords)

    out, moved = jax.jvp(attend, (cache.scale_v,), (cache.scale_v,))
    np.testing.assert_allclose(moved, out, rtol=1e-5, atol=1e-6)  # it is linear in scale_v


@each_kind
def test_exported_over_an_automatic_mesh(kind):
    """Custom partitioning cannot be exported; the reference is, and XLA spreads it."""
    q, cache, keywords = drawn(kind, B=4)
    mesh = jax.make_mesh((4,), ("dp",), (AxisType.Auto,))
    where = NamedSharding(mesh, P())
    spread = jax.jit(
        functools.partial(decode_attention, **keywords),
        in_shardings=(where, jax.tree.map(lambda _: where, cache)),
    )
    exported = jax.export.export(spread, disabled_checks=disabled_export_checks())(q, cache)
    assert exported.nr_devices == 4
    assert "decode_attention(" not in exported.mlir_module()
    out = jax.jit(exported.call)(jax.device_put(q, where), jax.device_put(cache, where))
    np.testing.assert_allclose(out, decode_attention(q, cache, **keywords), rtol=1e-5, atol=1e-6)


@each_kind
def test_exported_for_one_device(kind):
    q, cache, keywords = drawn(kind)
    attend = jax.jit(functools.partial(decode_attention, **keywords))
    exported = jax.export.export(attend, disabled_checks=disabled_export_checks())(q, cache)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(q, cache), attend(q, cache))


SYMBOLIC = {  # the caches', the queries' and the block table's shapes
    "contiguous": ("b, l, 2, 8", "b, s, 4, 8", None),
    "paged": ("n, r, 2, 8", "b, s, 4, 8", "b, m"),
}
SIZES = [dict(b=1, s=1, l=5, n=3, r=4, m=2), dict(b=3, s=20, l=300, n=9, r=16, m=3)]


@pytest.mark.parametrize("implementation", ["xla", None])
@each_kind
def test_exported_for_every_size(kind, implementation):
    """Exported once and serialised, and run with two sizes of everything but heads."""
    scale = np.full((2, 8), 0.02, np.float32)
    scope = jax.export.SymbolicScope()

    def attend(codes, q, positions, table):
        cls = KVCache if kind == "contiguous" else PagedKVCache
        cache = cls(codes, codes[::-1], scale, scale, scale, -scale, None)
        return decode_attention(
            q, cache, positions=positions, block_table=table, window=7, soft_cap=2.0,
            sinks=np.ones(4, np.float32), return_lse=True, implementation=implementation,
        )  # fmt: skip

    codes, q, table = (
        text and jax.export.symbolic_shape(text, scope=scope) for text in SYMBOLIC[kind]
    )
    arguments = [
        jax.ShapeDtypeStruct(codes, jnp.int8),
        jax.ShapeDtypeStruct(q, jnp.float32),
        jax.ShapeDtypeStruct(q[:2], jnp.int32),
        table and jax.ShapeDtypeStruct(table, jnp.int32),
    ]
    checks = disabled_export_checks()
    exported = jax.export.export(jax.jit(attend), disabled_checks=checks)(*arguments)
    again = jax.export.deserialize(exported.serialize())
    rng = np.random.default_rng(0)
    for sizes in SIZES:
        rows = sizes["l"] if kind == "contiguous" else sizes["m"] * sizes["r"]
        shapes = [
            text and [sizes.get(d, None) or int(d) for d in text.split(", ")]
            for text in SYMBOLIC[kind]
        ]
        values = [
            rng.integers(-128, 128, shapes[0], np.int8),
            rng.standard_normal(shapes[1]).astype(np.float32),
            rng.integers(-1, rows + 2, shapes[1][:2], np.int32),
            shapes[2] and rng.integers(-1, sizes["n"] + 1, shapes[2], np.int32),
        ]
        expected = attend(*map(jnp.asarray, values[:3]), values[3])
        for result, wanted in zip(again.call(*values), expected, strict=True):
            np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5)


@each_kind
def test_in_a_partly_manual_mesh(kind):
    q, cache, keywords = drawn(kind, B=4)
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (AxisType.Auto,) * 2)
    attend = functools.partial(decode_attention, **keywords)
    expected = attend(q, cache)

    def beside(q, cache):  # every device has all sequences; the axis tp stays automatic
        return attend(q, cache)[None]

    out = jax.jit(
        jax.shard_map(beside, mesh=mesh, in_specs=P(), out_specs=P("dp"), axis_names={"dp"})
    )(q, cache)
    for part in out:
        np.testing.assert_allclose(part, expected, rtol=1e-5, atol=1e-6)
    demanded = functools.partial(attend, implementation="ffi")
    with pytest.raises(NotImplementedError, match="cannot mix automatic mesh axes"):
        jax.jit(
            jax.shard_map(
                lambda q, cache: demanded(q, cache)[None],
                mesh=mesh, in_specs=P(), out_specs=P("dp"), axis_names={"dp"},
            )
        )(q, cache)  # fmt: skip


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@each_kind
def test_lowered_for_others_the_products_are_float32(kind, platform):
    """HIGHEST on both products: the default there is less. No transpose is asked of a cache."""
    q, cache, keywords = drawn(kind, B=2, rows=4096, block=32)
    attend = jax.jit(functools.partial(decode_attention, implementation="xla", **keywords))
    text = attend.trace(q, cache).lower(lowering_platforms=(platform,)).as_text()
    products = re.findall(r"stablehlo.dot_general.*", text)
    assert len(products) == 2
    assert all("precision = [HIGHEST, HIGHEST]" in product for product in products)
    size = "x".join(map(str, cache.k_cache.shape))
    assert f"tensor<{size}xi8>" in text
    assert not re.search(rf"stablehlo.transpose.*tensor<{size}xi8>", text)


@each_implementation
@each_kind
def test_write_and_attention_in_one_step(kind, implementation):
    """No transpose and no copy of a cache or of a layer; one native call of each operator."""
    call = Call(kind=kind, B=2, rows=32768, block=32, layers=2, D=32)
    _, cache, keywords = call.draw()
    H = (call.Nq + 2 * call.Nkv) * call.D
    x = jnp.ones((2, 1, H))
    table = keywords.get("block_table")
    positions = jnp.zeros((2,) if kind == "contiguous" else (2, 1), jnp.int32)
    tables = jnp.ones((2, 1, 1, call.D))

    def step(cache):
        where = {"block_table": table, "layer": 1, "implementation": implementation}
        q, cache = cache.update(x, tables, tables, positions, **where)
        return decode_attention(q, cache, jnp.ones((2,), jnp.int32), **where), cache

    compiled = jax.jit(step, donate_argnums=0).lower(cache).compile()
    hlo.assert_in_place(compiled, cache.k_cache.size)
    assert hlo.cache_copies(compiled.as_text(), cache.k_cache.size // 2) == []
    assert compiled.memory_analysis().temp_size_in_bytes < cache.k_cache.size // 2
    assert compiled.as_text().count(TARGET) == (implementation == "ffi")


@each_kind
def test_explain(kind):
    q, cache, keywords = drawn(kind)
    answer = explain_attention(q, cache, **keywords)
    assert answer[:2] == ("cpu", "ffi")
    assert "the native target 'decode_attention' takes this call" in answer.reason
    assert explain_attention(q, cache, **keywords, implementation="xla").implementation == "xla"
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (q, cache))
    assert explain_attention(*abstract, **keywords) == answer
    tpu = explain_attention(q, cache, **keywords, platform="tpu", implementation="ffi")
    assert tpu.implementation is None
    assert "no native target for platform 'tpu'" in tpu.reason
    with pytest.raises(TypeError, match="exactly one of `lengths`"):
        explain_attention(q, cache)


def test_explain_says_where_partitioning_cannot_be_had():
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (AxisType.Explicit, AxisType.Auto))
    q, cache, keywords = drawn("contiguous", B=4)
    placed = jax.device_put(q, NamedSharding(mesh, P("dp")))
    answer = explain_attention(placed, cache, **keywords)
    assert answer.implementation == "xla"
    assert "cannot mix automatic mesh axes" in answer.reason
