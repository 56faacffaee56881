"""A step, update and then attention, equals one device's on every layout, mesh and mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import hlo
from support.layouts import TABLE

from jax_kvcache import (
    KVCache,
    PagedKVCache,
    decode_attention,
    interleave_qkv_for_tensor_parallel,
)

B, S, Nq, Nkv, D = 4, 2, 8, 4, 8
H, ROWS, BLOCKS, BLOCK = (Nq + 2 * Nkv) * D, 32, 8, 16
SPLITS = (Nq * D, Nkv * D, Nkv * D)
MESHES = [(2, 2), (4, 1), (1, 4)]
COLUMNS = ("x", "weight_scale", "bias")
PER_TOKEN = ("x", "cos", "sin", "activation_scale", "positions", "seen", "block_table")

# The layouts of the operator's table, and rows of a sequence over several devices.
LAYOUTS = TABLE["layouts"] | {
    "rows": {"cache_mode": "contiguous", "C1_over_B": 1, "axes": {"rows": "dp", "heads": "tp"}},
    "layers": {"cache_mode": "page", "C1_over_B": 2, "axes": {"blocks": "dp"}, "layers": 2},
}
# Inside shard_map a device needs whole blocks, and the sequences of its own part of the cache.
MANUAL = [name for name in LAYOUTS if name not in ("block_rows", "more_blocks")]


def axes_of(layout, name):
    axes = layout["axes"].get(name)
    return tuple(axes) if isinstance(axes, list) else axes


@functools.cache
def arguments(name):
    """The cache and the step's arguments, as NumPy arrays."""
    layout, rng = LAYOUTS[name], np.random.default_rng(11)
    layers = layout.get("layers")
    lead = () if layers is None else (layers,)
    paged = layout["cache_mode"] == "page"
    sizes = (BLOCKS, BLOCK) if paged else (B * layout["C1_over_B"], ROWS)

    def floats(*shape, low=0.5, high=1.0):
        return rng.uniform(low, high, shape).astype(np.float32)

    codes = [rng.integers(-128, 128, (*lead, *sizes, Nkv, D), np.int8) for _ in "kv"]
    scales = [floats(*lead, Nkv, D, low=0.01, high=0.02) for _ in "kv"]
    offsets = [floats(*lead, Nkv, D, low=-9, high=9) for _ in "kv"]
    cls = PagedKVCache if paged else KVCache
    first = np.array([0, 29, -3, 11], np.int32)
    seen = np.where(first[:, None] >= 0, first[:, None] + np.arange(S, dtype=np.int32), -1)
    tokens = {
        "x": rng.integers(-4000, 4000, (B, S, H)).astype(np.int32),
        "cos": floats(B, S, 1, D),
        "sin": floats(B, S, 1, D),
        "activation_scale": floats(B, S),
        "weight_scale": floats(H, low=1e-4, high=2e-4),
        "bias": floats(H, low=-1),
        "positions": seen if paged else first,
        "seen": seen,
    }
    if paged:
        tokens["block_table"] = rng.permutation(BLOCKS).reshape(B, 2).astype(np.int32)
    return cls(*codes, *scales, *offsets, layers), tokens


def step(cache, tokens, window, implementation=None, axis_name=None, qkv_shards=None):
    tokens = dict(tokens)
    seen = tokens.pop("seen")
    where = {"axis_name": axis_name, "implementation": implementation}
    where |= {} if cache.layers is None else {"layer": 1}
    q, cache = cache.update(**tokens, **where, qkv_shards=qkv_shards)
    table = tokens.get("block_table")
    out, lse = decode_attention(
        q, cache, positions=seen, block_table=table, sinks=jnp.ones(q.shape[2]), window=window,
        return_lse=True, **where,
    )  # fmt: skip
    return cache, q, out, lse


def step_of(name, **options):
    """The step of a layout; one with sharded rows of blocks has no window, see below."""
    window = None if name == "block_rows" else 25
    return functools.partial(step, window=window, **options)


@functools.cache
def expected(name):
    step = step_of(name)
    return jax.tree.map(np.asarray, jax.jit(step)(*arguments(name)))


def assert_equal(result, name):
    """Codes and q to the bit; attention, whose sums have another order, to a few roundings."""
    cache, q, out, lse = jax.tree.map(np.asarray, result)
    right, right_q, right_out, right_lse = expected(name)
    np.testing.assert_array_equal(cache.k_cache, right.k_cache)
    np.testing.assert_array_equal(cache.v_cache, right.v_cache)
    np.testing.assert_array_equal(q, right_q)
    np.testing.assert_allclose(out, right_out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, right_lse, rtol=1e-5, atol=1e-5)


def cache_spec(name, cache):
    layout = LAYOUTS[name]
    rows = P(*(axes_of(layout, n) for n in ("blocks", "rows", "heads")))
    heads = axes_of(layout, "heads")
    lead = () if cache.layers is None else (None,)
    return jax.tree.map(lambda a: P(*lead, *rows) if a.dtype == np.int8 else P(*lead, heads), cache)


def place(tree, specs, mesh):
    return jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), tree, specs)


@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_automatic_and_explicit(name, shape, kind, implementation):
    mesh = jax.make_mesh(shape, ("dp", "tp"), (kind,) * 2)
    cache, tokens = arguments(name)
    specs = {n: P(axes_of(LAYOUTS[name], "tokens")) if n in PER_TOKEN else P() for n in tokens}
    caches = cache_spec(name, cache)
    placed = place(cache, caches, mesh)
    run = jax.jit(step_of(name, implementation=implementation), donate_argnums=0)
    result = run(placed, place(tokens, specs, mesh))
    for before, after in ((placed.k_cache, result[0].k_cache), (placed.v_cache, result[0].v_cache)):
        assert after.sharding.is_equivalent_to(before.sharding, before.ndim)
    assert_equal(result, name)


@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("name", MANUAL)
def test_manual_with_checks(name, shape, implementation):
    mesh = jax.make_mesh(shape, ("dp", "tp"), (AxisType.Auto,) * 2)
    layout, (cache, tokens) = LAYOUTS[name], arguments(name)
    heads = axes_of(layout, "heads")
    if heads:
        tokens = tokens | {
            n: np.asarray(interleave_qkv_for_tensor_parallel(tokens[n], SPLITS, mesh.shape[heads]))
            for n in COLUMNS
        }
    own = layout["cache_mode"] == "contiguous" and layout["C1_over_B"] == 1
    batch = axes_of(layout, "blocks") if own else None
    split = axes_of(layout, "rows") if own else axes_of(layout, "blocks")
    specs = {n: P(batch) if n in PER_TOKEN else P() for n in tokens}
    specs |= {n: P(*[batch, None] if n == "x" else [], heads) for n in COLUMNS}
    caches = cache_spec(name, cache)
    queries = P(batch, None, heads)
    run = jax.jit(
        jax.shard_map(
            step_of(
                name,
                implementation=implementation,
                axis_name=split,
                qkv_shards=mesh.shape[heads] if heads else None,
            ),
            mesh=mesh,
            in_specs=(caches, specs),
            out_specs=(caches, queries, queries, queries),
        ),
        donate_argnums=0,
    )
    assert_equal(run(place(cache, caches, mesh), place(tokens, specs, mesh)), name)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_rows_of_blocks_over_all_devices(shape, kind):
    """Without a window; with one, a device would have to know how many of its rows it covers."""
    mesh = jax.make_mesh(shape, ("dp", "tp"), (kind,) * 2)
    cache, tokens = arguments("block_rows")
    placed = place(cache, cache_spec("block_rows", cache), mesh)
    q = np.random.default_rng(0).standard_normal((B, S, Nq, D)).astype(np.float32)
    attend = functools.partial(
        decode_attention, positions=tokens["seen"], block_table=tokens["block_table"]
    )
    everywhere = jax.device_put(q, NamedSharding(mesh, P()))
    out = jax.jit(attend)(everywhere, placed)
    np.testing.assert_allclose(out, attend(q, cache), rtol=1e-5, atol=1e-5)
    with pytest.raises(Exception, match="`window` needs whole blocks on every device"):
        jax.jit(functools.partial(attend, window=3))(everywhere, placed).block_until_ready()


@pytest.mark.parametrize("shape", [(4, 1), (2, 2)], ids=str)
def test_what_moves(shape):
    """Merging takes one maximum and one sum; sequences and heads of their own take nothing."""
    mesh = jax.make_mesh(shape, ("dp", "tp"), (AxisType.Auto,) * 2)

    def moved(name, queries):
        cache, tokens = arguments(name)
        q = np.ones((B, S, Nq, D), np.float32)
        attend = jax.jit(
            lambda q, cache: decode_attention(
                q, cache, positions=tokens["seen"], block_table=tokens.get("block_table")
            )
        )
        where = cache_spec(name, cache)
        compiled = attend.lower(
            jax.device_put(q, NamedSharding(mesh, queries)), place(cache, where, mesh)
        ).compile()
        return hlo.collective_bytes(compiled.as_text())

    assert moved("batch_heads", P("dp", None, "tp")) == 0
    assert moved("heads", P(None, None, "tp")) == 0
    heads = Nq // shape[1]
    merged = 4 * B * S * heads * (1 + D + 1)
    assert moved("blocks_heads", P(None, None, "tp")) == merged
    assert moved("rows", P(None, None, "tp")) == merged


def test_what_comes_after_does_not_decide_where_a_cache_lies():
    """A replicated cache stays so, though the result is wanted with its heads split."""
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (AxisType.Auto,) * 2)
    cache, tokens = arguments("heads")
    placed = place(cache, jax.tree.map(lambda _: P(), cache), mesh)
    split = NamedSharding(mesh, P("dp", None, "tp"))
    run = jax.jit(step_of("heads"), donate_argnums=0, out_shardings=(None, split, split, split))
    result = run(placed, place(tokens, {name: P() for name in tokens}, mesh))
    assert result[0].k_cache.sharding.is_fully_replicated
    assert result[0].v_cache.sharding.is_fully_replicated
    assert result[2].sharding.is_equivalent_to(split, 4)
    assert_equal(result, "heads")


@pytest.mark.parametrize("steps", [1, 256])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_in_place(kind, steps):
    """Also where attention's result has as many bytes as the device's part of a cache."""
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (kind,) * 2)
    heads = NamedSharding(mesh, P("dp", None, "tp"))
    codes = jax.ShapeDtypeStruct((B, 4 * Nq * 64, Nkv, D), jnp.int8, sharding=heads)
    scales = jax.ShapeDtypeStruct((Nkv, D), jnp.float32, sharding=NamedSharding(mesh, P("tp")))
    cache = KVCache(codes, codes, scales, scales, None, None, None)
    assert B * 256 * Nq * D * 4 == codes.size

    def tokens(*shape, dtype=jnp.float32):
        where = NamedSharding(mesh, P("dp"))
        return jax.ShapeDtypeStruct((B, *shape), dtype, sharding=where)

    def step(cache, x, cos, first):
        q, cache = cache.update(x, cos, cos, first)
        return decode_attention(q, cache, first + steps), cache

    out_shardings = None  # in explicit mode they follow from the types
    if kind == AxisType.Auto:
        out_shardings = None, jax.tree.map(lambda a: a.sharding, cache)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=out_shardings)
    x, cos, first = tokens(steps, H), tokens(steps, 1, D), tokens(dtype=jnp.int32)
    compiled = jitted.lower(cache, x, cos, first).compile()
    hlo.assert_in_place(compiled, codes.size // 4)


def test_a_cache_cut_through_its_heads_is_refused():
    mesh = jax.make_mesh((1, 4), ("dp", "tp"), (AxisType.Explicit,) * 2)
    cache, tokens = arguments("heads")
    cut = jax.tree.map(lambda a: P(None, None, None, "tp") if a.ndim == 4 else P(), cache)
    q = jax.device_put(np.ones((B, S, Nq, D), np.float32), NamedSharding(mesh, P()))
    with pytest.raises(ValueError, match="`k_cache` must not be sharded over its last dimension D"):
        decode_attention(q, place(cache, cut, mesh), positions=tokens["seen"])
