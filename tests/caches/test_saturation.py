"""The share of codes at either end of their range, against NumPy."""

import dataclasses

import jax
import numpy as np
import pytest
from support import caches
from support.caches import BLOCK, BLOCKS, C2, B, L

from jax_kvcache import KVCache, PagedKVCache

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


def wide(kind, head_dim, rows=64):
    """A cache of two layers with the head size of a model, and all codes in it."""
    ones = np.ones((2, 4, head_dim), np.float32)
    make = (KVCache if kind == "contiguous" else PagedKVCache).create
    cache = make(8, rows, 4, head_dim, layers=2, scale_k=ones, scale_v=ones)
    codes = np.random.default_rng(1).integers(-128, 128, (2, *cache.k_cache.shape), np.int8)
    return dataclasses.replace(cache, k_cache=codes[0], v_cache=codes[1])


def in_whole_blocks(cache):
    """The saturation where each of eight sequences, or blocks, has half of its rows in use."""
    lengths = np.full(8, cache.k_cache.shape[-3] // 2, np.int32)
    if isinstance(cache, KVCache):
        return cache.saturation(lengths)
    return cache.saturation(lengths, block_table=np.arange(8, dtype=np.int32)[:, None])


@pytest.mark.parametrize("head_dim", [6, 80, 128, 512])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_head_sizes(kind, head_dim):
    cache = wide(kind, head_dim)
    rows = {(block, row) for block in range(8) for row in range(32)}
    np.testing.assert_allclose(in_whole_blocks(cache), expected(cache, rows), rtol=1e-6)


@pytest.mark.parametrize("head_dim", [80, 128, 256])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_temporaries_are_small(kind, head_dim):
    cache = wide(kind, head_dim)
    memory = jax.jit(in_whole_blocks).lower(cache).compile().memory_analysis()
    assert memory.temp_size_in_bytes < cache.k_cache.size // 10


def test_many_codes_are_counted():
    """Nearly 2**25 codes at an end, more than float32 counts one by one."""
    ones = np.ones((1, 2), np.float32)
    cache = PagedKVCache.create(2**12, 2**12, 1, 2, scale_k=ones, scale_v=ones)
    codes = np.full(cache.k_cache.shape, 127, np.int8)
    codes[:, ::64, 0, 1] = 0
    cache = dataclasses.replace(cache, k_cache=codes)
    lengths, table = np.full(1, 2**24, np.int32), np.arange(2**12, dtype=np.int32)[None]
    share = cache.saturation(lengths, block_table=table).k
    np.testing.assert_allclose(share, 1 - 1 / 128, rtol=1e-6)


def test_it_refuses():
    with pytest.raises(ValueError, match=r"`lengths` must have shape \[B\] = \[3\], got \[2\]"):
        with_codes("contiguous", None).saturation([1, 2])
    paged = with_codes("paged", None)
    with pytest.raises(TypeError, match="`block_table` is required, got None"):
        paged.saturation([1, 2, 3], block_table=None)
    with pytest.raises(ValueError, match=r"`block_table` must have shape \[B, M\] = \[2, any\]"):
        paged.saturation([1, 2], block_table=caches.TABLE)
