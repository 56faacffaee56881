"""Every implementation gives attention in float64, within the accuracy that is promised."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import attention
from support.attention import BF16, CALLS, Call

from jax_kvcache import KVCache, decode_attention, merge_attention

IMPLEMENTATIONS = ["xla", "ffi"]
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@each_implementation
@pytest.mark.parametrize("name", CALLS)
def test_equals_float64(name, implementation):
    attention.check(CALLS[name], implementation)


@each_implementation
@pytest.mark.parametrize("weight", [1.0, 0.7])
@pytest.mark.parametrize(("Nkv", "D"), [(4, 128), (1, 16)])
def test_equal_values_of_many_rows(Nkv, D, weight, implementation):
    """The mean of equal values is that value, although the roundings of their sum go one way."""
    rows, offset = 100_000, np.float32(-99.83203125)  # 128 * 226.8 and its multiples lose the most
    k = np.zeros((1, rows, Nkv, D), np.int8)
    k[:, 0] = 1  # so that every other row has the weight
    offsets, scales = jnp.full((Nkv, D), offset), jnp.ones((Nkv, D))
    v = jnp.full(k.shape, 127, jnp.int8)
    cache = KVCache(jnp.asarray(k), v, scales, scales, jnp.zeros((Nkv, D)), offsets, None)
    q = jnp.full((1, 1, Nkv, D), -np.log(weight) / D, jnp.float32)
    out = decode_attention(
        q, cache, np.array([rows], np.int32), scale=1.0, implementation=implementation
    )
    value = 127 - float(offset)
    assert np.abs(np.asarray(out, np.float64) / value - 1).max() < 5e-6


@each_implementation
def test_the_highest_position_sees_a_cache_of_one_row(implementation):
    cache = KVCache.create(1, 1, 1, 2, scale_k=jnp.ones((1, 2)), scale_v=jnp.ones((1, 2)))
    cache = dataclasses.replace(cache, v_cache=jnp.full_like(cache.v_cache, 7))
    for position in (0, 2**31 - 2, 2**31 - 1):
        positions = np.full((1, 1), position, np.int32)
        q = jnp.ones((1, 1, 1, 2))
        out = decode_attention(q, cache, positions=positions, implementation=implementation)
        np.testing.assert_array_equal(out, np.full((1, 1, 1, 2), 7.0))


@each_implementation
@pytest.mark.parametrize("name", ["one token", "paged, everything"])
def test_equals_float64_eagerly(name, implementation):
    attention.check(CALLS[name], implementation, transform=lambda function: function)


@each_implementation
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_lengths_are_the_last_querys_rows(kind, implementation):
    """lengths - S + s + 1 rows; 0 or less, and past the end, are legal."""
    q, cache, keywords = Call(kind=kind, S=3).draw()
    for lengths in ([3, 17, 40], [0, 1, 2], [-5, 60, 2**31 - 1], [-(2**31), 5, 40]):
        lengths = np.array(lengths, np.int64)
        positions = np.maximum(lengths, 0)[:, None] - 3 + np.arange(3)
        keywords["positions"] = positions.astype(np.int32)
        expected = decode_attention(q, cache, implementation=implementation, **keywords)
        others = {name: value for name, value in keywords.items() if name != "positions"}
        out = decode_attention(
            q, cache, lengths.astype(np.int32), implementation=implementation, **others
        )
        np.testing.assert_array_equal(out, expected)


MORE = {
    "plain": {},
    "soft cap": {"soft_cap": 2.0},
    "sinks": {"sinks": True},
    "window": {"window": 5},
}


@each_implementation
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("S", "more"), [(2, "plain"), *((17, more) for more in MORE)])
def test_what_is_not_finite_stays_in_its_row(S, more, bad, kind, implementation):
    q, cache, keywords = Call(kind=kind, S=S, full=True, **MORE[more]).draw()
    clean = decode_attention(q, cache, implementation=implementation, **keywords)
    spoiled = q.at[1, 0, 2, 3].set(bad)
    out = decode_attention(spoiled, cache, implementation=implementation, **keywords)
    own = np.zeros(q.shape[:3], bool)
    own[1, 0, 2] = True
    np.testing.assert_array_equal(np.asarray(out)[~own], np.asarray(clean)[~own])
    if np.isnan(bad) or more != "soft cap":  # which may make a finite score of an infinite one
        assert not np.isfinite(np.asarray(out)[own]).any()


@each_implementation
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_rows_out_of_sight_do_not_matter(kind, implementation):
    """Other layers' rows and rows past the positions change no bit."""
    call = Call(kind=kind, layers=2, rows=40, S=2)
    q, cache, keywords = call.draw()
    keywords["positions"] = np.array([[4, 5], [-1, -1], [20, 21]], np.int32)
    before = decode_attention(q, cache, implementation=implementation, **keywords)
    keep = np.zeros(cache.k_cache.shape[:3], bool)
    for b, position in enumerate(keywords["positions"][:, -1]):
        rows = np.arange(position + 1)
        if kind == "contiguous":
            keep[1, b, rows] = True
        else:
            keep[1, keywords["block_table"][b, rows // call.block], rows % call.block] = True
    _, other, _ = call.draw(seed=1)
    mixed = {
        name: jnp.where(keep[..., None, None], getattr(cache, name), getattr(other, name))
        for name in ("k_cache", "v_cache")
    }
    scales = (cache.scale_k, cache.scale_v, cache.offset_k, cache.offset_v, cache.layers)
    changed = type(cache)(*mixed.values(), *scales)
    after = decode_attention(q, changed, implementation=implementation, **keywords)
    np.testing.assert_array_equal(before, after)


@each_implementation
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("layer", [-1, 2, 2**31 - 1, -(2**31)])
def test_a_traced_layer_that_does_not_exist_gives_nan(kind, layer, implementation):
    q, cache, keywords = Call(kind=kind, layers=2).draw()

    @jax.jit
    def run(layer):
        return decode_attention(
            q, cache, return_lse=True, implementation=implementation, **keywords | {"layer": layer}
        )

    out, lse = run(jnp.int32(layer))
    assert np.isnan(out).all()
    assert np.isnan(lse).all()
    out, _ = run(jnp.int32(0))
    assert np.isfinite(out).all()


LAYERS = [  # how many there are, and a number of some dtype
    (2, 100, "int8"),
    (2, 200, "uint8"),
    (2, 256, "int16"),
    (2, 2**16, "uint32"),
    (2, 2**32 - 1, "uint32"),
    (200, 127, "int8"),  # which cannot hold the number of layers
]


@each_implementation
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize(("layers", "number", "dtype"), LAYERS)
def test_layers_of_other_integer_dtypes(layers, number, dtype, kind, implementation):
    """Alone and under vmap; no number wraps around to another layer."""
    q, cache, keywords = Call(kind=kind, layers=layers).draw()

    def attend(layer):
        changed = keywords | {"layer": layer, "implementation": implementation}
        return decode_attention(q, cache, **changed)

    numbers = jnp.array([1, number, 0], dtype)
    together = jax.jit(jax.vmap(attend))(numbers)
    for traced, out in zip(numbers, together, strict=True):
        known = int(traced)
        expected = attend(known) if known < layers else np.full(q.shape, np.nan)
        np.testing.assert_allclose(out, expected, atol=1e-6)
        np.testing.assert_allclose(jax.jit(attend)(traced), expected, atol=1e-6)


@each_implementation
@pytest.mark.parametrize("sink", [-np.inf, -3e38, -1e30, 1e30, 3e38])
def test_extreme_sinks(sink, implementation):
    """One far below takes nothing, and one far above takes all."""
    q, cache, keywords = Call().draw()
    keywords |= {"return_lse": True, "implementation": implementation}
    out, lse = decode_attention(q, cache, **keywords)
    sinks = np.full(q.shape[2], sink, np.float32)
    with_sinks, same_lse = decode_attention(q, cache, sinks=sinks, **keywords)
    np.testing.assert_allclose(with_sinks, out if sink < 0 else np.zeros_like(out), atol=1e-6)
    np.testing.assert_array_equal(same_lse, lse)


@each_implementation
def test_a_traced_scale_is_the_same_factor(implementation):
    q, cache, keywords = Call().draw()
    keywords["scale"] = 0.25
    static = decode_attention(q, cache, implementation=implementation, **keywords)
    keywords.pop("scale")
    traced = jax.jit(
        lambda scale: decode_attention(
            q, cache, scale=scale, implementation=implementation, **keywords
        )
    )(jnp.float32(0.25))
    np.testing.assert_allclose(traced, static, rtol=1e-6, atol=1e-6)


@each_implementation
@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sinks", [False, True])
def test_parts_merge_into_the_whole(sinks, dtype, implementation):
    """Attention over two sets of blocks, merged, is attention over all of them."""
    q, cache, keywords = Call(kind="paged", rows=64, full=True, sinks=sinks, dtype=dtype).draw()
    table, sink = keywords["block_table"], keywords.pop("sinks", None)
    whole = decode_attention(q, cache, sinks=sink, implementation=implementation, **keywords)
    parts = []
    for keep in (np.arange(8) < 3, np.arange(8) >= 3, np.zeros(8, bool)):
        keywords["block_table"] = np.where(keep, table, -1).astype(np.int32)
        parts.append(
            decode_attention(q, cache, return_lse=True, implementation=implementation, **keywords)
        )
    merged = merge_attention(*zip(*parts, strict=True), sinks=sink)
    assert merged.dtype == whole.dtype
    tolerance = 1e-5 if dtype == np.float32 else 2e-2
    np.testing.assert_allclose(
        np.asarray(merged, np.float32), np.asarray(whole, np.float32), atol=tolerance
    )


NOT_SEEN = -np.inf
LSES = {  # of three parts
    "huge": (1e30, 1e30, -1e30),
    "the largest": (3.4e38, 3.4e38, -3.4e38),
    "opposite": (3.4e38, -3.4e38, 0),
    "far below": (-3e38, -3e38, -3e38),
    "one part": (NOT_SEEN, 5, NOT_SEEN),
    "nothing": (NOT_SEEN,) * 3,
    "where exp overflows": (1000, 1001, 999),
    "where its sum does": (88.7, 88.7, -90),
}


@pytest.mark.parametrize("sink", [None, 0.0, 3.4e38, -3.4e38, -np.inf, 1e4])
@pytest.mark.parametrize("name", LSES)
def test_merging_overflows_never(name, sink):
    lses = np.array(LSES[name])
    outs = np.random.default_rng(0).standard_normal((3, 2, 4, 8)).astype(np.float32)
    outs[lses == NOT_SEEN] = 0
    logits = np.append(lses, NOT_SEEN if sink is None else np.float64(sink))
    with np.errstate(invalid="ignore"):
        weights = np.exp(logits - logits.max())
    seen = (lses != NOT_SEEN).any()
    mean = np.tensordot(weights[:3] / weights.sum(), outs.astype(np.float64), 1) if seen else 0
    parts = [np.full((2, 4), lse, np.float32) for lse in lses]
    merged = merge_attention(list(outs), parts, None if sink is None else np.full(4, sink, "f"))
    np.testing.assert_allclose(merged, np.broadcast_to(mean, merged.shape), atol=1e-6)
