"""decode_attention against attention in float64 over the dequantised rows that are in use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention_calls import BLOCK, BLOCKS, C2, B, D, L, Nq, S, attend, make, reference

from jax_kvcache import KVCache, decode_attention


@pytest.mark.parametrize("offsets", [False, True], ids=["symmetric", "offsets"])
@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_equals_attention_in_float64(kind, layer, offsets):
    rng = np.random.default_rng(1)
    cache, table = make(kind, rng, layers=None if layer is None else L, offsets=offsets)
    q = rng.normal(size=(B, S, Nq, D)).astype(np.float32)
    for lengths in ([2, 127, 130], [0, 1, 288], [128, 256, 2]):
        out = attend(q, cache, np.array(lengths, np.int32), block_table=table, layer=layer)
        expected = reference(q, cache, lengths, table, layer)
        np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)


def test_lengths_at_and_past_the_ends():
    rng = np.random.default_rng(2)
    cache, _ = make("contiguous", rng, offsets=True)
    q = rng.normal(size=(B, S, Nq, D)).astype(np.float32)
    out = attend(q, cache, np.array([C2, C2 + 50, -4], np.int32))
    expected = reference(q, cache, [C2, C2 + 50, -4])
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)
    assert not np.any(out[2])
    assert not np.any(attend(q, cache, np.zeros(B, np.int32)))


def test_scale_and_dtype():
    rng = np.random.default_rng(3)
    cache, _ = make("contiguous", rng)
    q = jnp.asarray(rng.normal(size=(B, S, Nq, D)), jnp.bfloat16)
    out = attend(q, cache, np.full(B, 9, np.int32), scale=0.5)
    assert out.dtype == jnp.bfloat16
    expected = reference(np.asarray(q, np.float32), cache, [9] * B, scale=0.5)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_rows_out_of_sight_do_not_matter(kind):
    """Other sequences' rows, rows past the length and the other layer change no bit."""
    rng = np.random.default_rng(4)
    cache, table = make(kind, rng, layers=L)
    q = rng.normal(size=(B, S, Nq, D)).astype(np.float32)
    lengths = np.array([5, 130, 200], np.int32)
    before = attend(q, cache, lengths, block_table=table, layer=1)
    keep = np.zeros(cache.k_cache.shape[:3], bool)
    for b, n in enumerate(lengths):
        rows = np.arange(n)
        first = b if table is None else table[b, rows // BLOCK]
        keep[1, first, rows if table is None else rows % BLOCK] = True
    keep = keep[..., None, None]
    junk = rng.integers(-128, 128, cache.k_cache.shape, np.int8)
    other = type(cache)(
        k_cache=jnp.where(keep, cache.k_cache, junk),
        v_cache=jnp.where(keep, cache.v_cache, junk),
        scale_k=cache.scale_k,
        scale_v=cache.scale_v,
        offset_k=None,
        offset_v=None,
        layers=L,
    )
    np.testing.assert_array_equal(before, attend(q, other, lengths, block_table=table, layer=1))


def test_rows_of_blocks_that_do_not_exist_are_not_seen():
    rng = np.random.default_rng(5)
    cache, table = make("paged", rng)
    q = rng.normal(size=(B, 1, Nq, D)).astype(np.float32)
    whole = attend(q, cache, np.full(B, BLOCK, np.int32), block_table=table)
    for hole in (-1, BLOCKS, np.iinfo(np.int32).max, np.iinfo(np.int32).min):
        holed = table.copy()
        holed[:, 1:] = hole
        out = attend(q, cache, np.full(B, 3 * BLOCK, np.int32), block_table=holed)
        np.testing.assert_allclose(out, whole, rtol=1e-6, atol=1e-6)


def test_vmap_equals_a_loop():
    rng = np.random.default_rng(6)
    caches = [make("contiguous", rng)[0] for _ in range(2)]
    q = rng.normal(size=(2, B, S, Nq, D)).astype(np.float32)
    lengths = np.array([[3, 140, 0], [129, 7, 300]], np.int32)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
    mapped = jax.jit(jax.vmap(decode_attention))(q, stacked, lengths)
    for i, cache in enumerate(caches):
        np.testing.assert_allclose(mapped[i], attend(q[i], cache, lengths[i]), atol=1e-6)


SCALE = np.full((1, 2), 0.02, np.float32)


def filled(B, rows):
    """A cache of one head of two columns, with so many rows written of each sequence."""
    empty = KVCache.create(B, 8, 1, 2, scale_k=SCALE, scale_v=SCALE)
    x, cos = np.ones((B, rows, 6), np.float32), np.ones((B, rows, 1, 2), np.float32)
    return empty.update(x, cos, cos, np.zeros(B, np.int32))[1]


@pytest.mark.parametrize(
    ("q", "scale"), [(np.nan, None), (np.inf, None), (1.0, np.nan), (1.0, np.inf)]
)
def test_it_hands_on_what_is_not_finite(q, scale):
    cache = filled(1, 1)
    q = np.full((1, 1, 1, 2), q, np.float32)
    assert np.isnan(decode_attention(q, cache, np.array([1], np.int32), scale=scale)).all()
    empty = decode_attention(q, cache, np.array([0], np.int32), scale=scale)
    np.testing.assert_array_equal(empty, np.zeros_like(empty))


def test_no_row_is_seen_for_any_negative_length():
    two = filled(2, 8)
    q = np.ones((2, 3, 1, 2), np.float32)
    out = np.asarray(decode_attention(q, two, np.array([-(2**31), 8], np.int32)))
    np.testing.assert_array_equal(out[0], np.zeros_like(out[0]))
    assert np.all(out[1] != 0)
