"""The share of codes at either end of their range, against NumPy."""

import dataclasses

import jax
import numpy as np
import pytest
from support import caches
from support.caches import BLOCK, BLOCKS, C2, B, L

from jax_kvcache import PagedKVCache

LENGTHS = np.array([5, 0, 12], np.int32)


def with_codes(kind, layers):
    rng = np.random.default_rng(9)
    cache = caches.make(kind, rng, layers=layers)
    codes = [
        rng.choice(np.array([-128, -127, 0, 126, 127], np.int8), cache.k_cache.shape) for _ in "kv"
    ]
    return dataclasses.replace(cache, k_cache=codes[0], v_cache=codes[1])


def expected(cache, rows):
    """The shares over the rows (first index, second index) of every layer."""
    shares = []
    for codes in (cache.k_cache, cache.v_cache):
        used = np.stack([codes[..., i, j, :, :] for i, j in sorted(rows)], axis=-3)
        shares.append(np.isin(used, (-128, 127)).mean(axis=(-3, -2, -1)))
    return shares


@pytest.mark.parametrize("layers", [None, L])
def test_contiguous(layers):
    cache = with_codes("contiguous", layers)
    rows = {(b, row) for b in range(B) for row in range(LENGTHS[b])}
    for function in (cache.saturation, jax.jit(cache.saturation)):
        got = function(LENGTHS)
        assert got.k.shape == (() if layers is None else (layers,))
        np.testing.assert_allclose(got, expected(cache, rows), rtol=1e-6)
    every = {(b, row) for b in range(B) for row in range(C2)}
    more = cache.saturation([C2 + 7, C2, 2**31 - 1])
    np.testing.assert_allclose(more, expected(cache, every), rtol=1e-6)
    np.testing.assert_array_equal(cache.saturation([0, -3, 0]), np.zeros_like(more))


@pytest.mark.parametrize("layers", [None, L])
def test_paged(layers):
    """Rows that two sequences share count once; a block that does not exist has no rows."""
    cache = with_codes("paged", layers)
    table = np.array([[5, 2, -1], [5, BLOCKS, 2**31 - 1], [0, 7, 3]], np.int32)
    lengths = np.array([6, 12, 9], np.int32)
    rows = {(5, i) for i in range(BLOCK)} | {(2, 0), (2, 1), (3, 0)}
    rows |= {(block, i) for block in (0, 7) for i in range(BLOCK)}
    got = jax.jit(cache.saturation)(lengths, block_table=table)
    np.testing.assert_allclose(got, expected(cache, rows), rtol=1e-6)


def test_more_rows_in_the_table_than_int32_counts():
    size, ones = 2**20, np.ones((1, 2), np.float32)
    cache = PagedKVCache.create(2, size, 1, 2, scale_k=ones, scale_v=ones)
    cache = dataclasses.replace(cache, k_cache=cache.k_cache.at[1].set(127))
    table = np.array([[0] * 2048 + [1] * 2048], np.int32)
    np.testing.assert_array_equal(cache.saturation([5], block_table=table), [0, 0])


def test_it_refuses():
    with pytest.raises(ValueError, match=r"`lengths` must have shape \[B\] = \[3\], got \[2\]"):
        with_codes("contiguous", None).saturation([1, 2])
    paged = with_codes("paged", None)
    with pytest.raises(TypeError, match="`block_table` is required, got None"):
        paged.saturation([1, 2, 3], block_table=None)
    with pytest.raises(ValueError, match=r"`block_table` must have shape \[B, M\] = \[2, any\]"):
        paged.saturation([1, 2], block_table=caches.TABLE)
