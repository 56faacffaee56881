"""KVCache and PagedKVCache against the NumPy oracle, byte for byte, and as pytrees."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support.caches import (
    BLOCK,
    BLOCKS,
    C2,
    INT32,
    POSITIONS,
    SLOTS,
    TABLE,
    B,
    D,
    H,
    L,
    Nkv,
    S,
    make,
    tokens,
)  # fmt: skip
from support.oracle import dequant_rope_quant_kvcache as oracle
from support.results import OF_A_STEP, assert_results

from jax_kvcache import KVCache, slots_from_block_table


def expected_update(cache, call, indices, layer=None):
    """q, k_cache and v_cache after the call, by the oracle on the cache or on one layer."""

    def part(array):
        array = None if array is None else np.asarray(array)
        return array if layer is None or array is None else array[layer]

    call = dict(call)
    q, _, _, k_cache, v_cache = oracle(
        call.pop("x"), call.pop("cos"), call.pop("sin"), part(cache.k_cache), part(cache.v_cache),
        indices, part(cache.scale_k), part(cache.scale_v),
        offset_k=part(cache.offset_k), offset_v=part(cache.offset_v), **call,
        cache_mode="contiguous" if isinstance(cache, KVCache) else "page",
    )  # fmt: skip
    if layer is None:
        return q, k_cache, v_cache
    whole_k, whole_v = np.array(cache.k_cache), np.array(cache.v_cache)
    whole_k[layer], whole_v[layer] = k_cache, v_cache
    return q, whole_k, whole_v


def assert_equal(out, expected):
    q, cache = out
    assert_results((q, cache.k_cache, cache.v_cache), expected, names=OF_A_STEP)


@functools.partial(jax.jit, static_argnames="implementation")
def update(cache, call, **options):
    return cache.update(**call, **options)


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("offsets", [False, True], ids=["symmetric", "offsets"])
@pytest.mark.parametrize("layer", [None, 0, 2])
def test_contiguous_update_is_the_operator(layer, offsets, implementation):
    rng = np.random.default_rng(1)
    cache = make("contiguous", rng, layers=None if layer is None else L, offsets=offsets)
    for starts in ([0, 5, C2 - 2], [C2 - 1, -1, 3], [C2, INT32.max, INT32.min]):
        call, starts = tokens(rng), np.array(starts, np.int32)
        expected = expected_update(cache, call, starts, layer)
        out = update(
            cache, call | {"positions": starts}, layer=layer, implementation=implementation
        )
        assert_equal(out, expected)
        cache = out[1]


def test_a_cache_of_more_sequences_than_the_batch():
    rng = np.random.default_rng(2)
    cache = make("contiguous", rng, batch=B + 2, layers=L)
    call, starts = tokens(rng), np.array([1, C2 - 1, 4], np.int32)
    out = update(cache, call | {"positions": starts}, layer=1)
    assert_equal(out, expected_update(cache, call, starts, 1))


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("layer", [None, 0, 2])
def test_paged_update_is_the_operator(layer, implementation):
    rng = np.random.default_rng(3)
    cache = make("paged", rng, layers=None if layer is None else L)
    call = tokens(rng)
    expected = expected_update(cache, call, SLOTS, layer)
    out = update(
        cache,
        call | {"positions": POSITIONS},
        block_table=TABLE,
        layer=layer,
        implementation=implementation,
    )
    assert_equal(out, expected)


@pytest.mark.parametrize("layer", [-1, L, INT32.max, INT32.min])
def test_a_layer_that_does_not_exist_is_not_written(layer):
    rng = np.random.default_rng(4)
    cache, call = make("contiguous", rng, layers=L), tokens(rng)
    _, after = update(cache, call | {"positions": np.zeros(B, np.int32)}, layer=jnp.int32(layer))
    assert not np.any(after.k_cache)
    assert not np.any(after.v_cache)


def test_float_x():
    rng = np.random.default_rng(5)
    cache, call = make("contiguous", rng, layers=L), tokens(rng)
    call = {name: call[name] for name in ("cos", "sin")}
    call["x"] = rng.normal(size=(B, S, H)).astype(ml_dtypes.bfloat16)
    starts = np.zeros(B, np.int32)
    out = update(cache, call | {"positions": starts}, layer=1)
    assert_equal(out, expected_update(cache, call, starts, 1))


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_kv_output_returns_k_and_v_between_q_and_the_cache(kind):
    rng = np.random.default_rng(10)
    cache, call = make(kind, rng, layers=L, offsets=True), tokens(rng)
    where = {"positions": np.zeros(B, np.int32)}
    if kind == "paged":
        where = {"positions": POSITIONS, "block_table": TABLE}
    q, k, v, after = cache.update(**call, **where, layer=1, kv_output=True)
    indices = SLOTS if kind == "paged" else where["positions"]
    wanted = oracle(
        call["x"], call["cos"], call["sin"], *(np.asarray(a)[1] for a in (
            cache.k_cache, cache.v_cache)), indices,
        *(np.asarray(a)[1] for a in (cache.scale_k, cache.scale_v)),
        **{n: np.asarray(getattr(cache, n))[1] for n in ("offset_k", "offset_v")},
        **{n: call[n] for n in ("weight_scale", "activation_scale", "bias")},
        cache_mode="page" if kind == "paged" else "contiguous", kv_output=True,
    )  # fmt: skip
    assert_results((q, k, v, after.k_cache[1], after.v_cache[1]), wanted)
    short = cache.update(**call, **where, layer=1)
    jax.tree.map(np.testing.assert_array_equal, short, (q, after))


@pytest.mark.parametrize("layers", [None, L])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_printing_takes_one_line(kind, layers):
    cache = make(kind, np.random.default_rng(11), layers=layers)
    codes = list(cache.k_cache.shape)
    name = "KVCache" if kind == "contiguous" else "PagedKVCache"
    assert str(cache) == (
        f"{name}(k_cache=int8{codes}, v_cache=int8{codes}, "
        f"scale_k=float32{list(cache.scale_k.shape)}, scale_v=float32{list(cache.scale_v.shape)}, "
        f"offset_k=None, offset_v=None, layers={layers}, num_q_heads=None, "
        f"nbytes={cache.nbytes:_})"
    )
    assert str(jax.eval_shape(lambda: cache)) == str(cache)
    seen = []
    jax.jit(lambda cache: seen.append(str(cache)))(cache)
    assert seen == [str(cache)]
    assert "k_cache=0" in str(jax.tree.map(lambda leaf: 0, cache))


def test_slots_from_block_table():
    slots = jax.jit(slots_from_block_table, static_argnums=2)
    np.testing.assert_array_equal(slots(TABLE, POSITIONS, BLOCK), SLOTS)
    huge = np.array([[2**30, 2**31 - 1, 2**29]], np.int32)  # times 4: wraps to 0, -4, INT32_MIN
    np.testing.assert_array_equal(slots(huge, np.array([[0, 4, 8]], np.int32), BLOCK), [[-1] * 3])
    last = INT32.max // BLOCK - 1
    np.testing.assert_array_equal(
        slots(np.array([[last]], np.int32), np.array([[3]], np.int32), BLOCK), [[last * BLOCK + 3]]
    )
    np.testing.assert_array_equal(slots(TABLE[:, :0], POSITIONS, BLOCK), np.full((B, S), -1))


@pytest.mark.parametrize("offsets", [False, True], ids=["symmetric", "offsets"])
@pytest.mark.parametrize("layers", [None, L])
def test_dequantize_inverts_the_quantisation(layers, offsets):
    rng = np.random.default_rng(6)
    cache = make("paged", rng, layers=layers, offsets=offsets)
    codes = rng.integers(-128, 128, cache.k_cache.shape, np.int8)
    cache = jax.tree.map(lambda leaf: jnp.asarray(codes) if leaf.dtype == jnp.int8 else leaf, cache)
    for value, scale, offset in zip(
        cache.dequantize(), (cache.scale_k, cache.scale_v), (cache.offset_k, cache.offset_v),
        strict=True,
    ):  # fmt: skip
        scale = np.asarray(scale, np.float64).reshape(-1, 1, 1, Nkv, D)
        offset = 0 if offset is None else np.asarray(offset, np.float64).reshape(scale.shape)
        expected = (codes.reshape(-1, BLOCKS, BLOCK, Nkv, D) - offset) * scale
        np.testing.assert_allclose(value, expected.reshape(codes.shape), rtol=1e-6)
    assert cache.dequantize(jnp.bfloat16)[0].dtype == jnp.bfloat16
    with pytest.raises(TypeError, match="`dtype` must be a floating-point dtype, got int8"):
        cache.dequantize(jnp.int8)


def test_it_is_a_pytree_with_static_facts():
    cache = make("contiguous", np.random.default_rng(7), layers=L, offsets=True)
    leaves, structure = jax.tree.flatten(cache)
    assert len(leaves) == 6
    assert cache.nbytes == 2 * L * B * C2 * Nkv * D + 4 * L * Nkv * D * 4
    assert jax.tree.unflatten(structure, leaves).layers == L
    assert structure != jax.tree.structure(make("contiguous", np.random.default_rng(7), layers=2))
    assert len(jax.tree.leaves(make("paged", np.random.default_rng(7)))) == 4


def test_the_caller_keeps_the_scales_and_passes_one_array_twice():
    scale = jnp.ones((Nkv, D), jnp.float32)
    cache = KVCache.create(B, C2, Nkv, D, scale_k=scale, scale_v=scale)
    call = tokens(np.random.default_rng(8)) | {"positions": np.zeros(B, np.int32)}
    pointer = cache.k_cache.unsafe_buffer_pointer()
    step = jax.jit(lambda cache, call: cache.update(**call)[1], donate_argnums=0)
    cache = step(cache, call)
    assert cache.k_cache.unsafe_buffer_pointer() == pointer
    np.testing.assert_array_equal(scale + 0, np.ones((Nkv, D)))


def test_vmap_equals_a_loop():
    rng = np.random.default_rng(9)
    caches = [make("contiguous", rng, layers=L) for _ in range(2)]
    calls = [tokens(rng) | {"positions": np.full(B, 3 * i, np.int32)} for i in range(2)]
    stack = lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
    q, mapped = jax.jit(jax.vmap(lambda cache, call, layer: cache.update(**call, layer=layer)))(
        stack(*caches), stack(*calls), jnp.array([2, 0])
    )
    for i, (cache, call, layer) in enumerate(zip(caches, calls, (2, 0), strict=True)):
        expected = update(cache, call, layer=layer)
        one = jax.tree.map(lambda leaf, i=i: leaf[i], (q, mapped))
        jax.tree.map(np.testing.assert_array_equal, one, expected)
