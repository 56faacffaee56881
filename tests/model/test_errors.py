"""What the decoder's forward pass refuses, with its messages, and the lists that it takes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import checkpoint_folder

from jax_kvcache import KVCache, checkpoints
from jax_kvcache.model import FloatCache, forward, forward_float, new_cache, new_paged_cache

B, S, ROWS, L, Nkv, D = 3, 5, 8, 2, 2, 16
TOKENS, START = np.arange(B * S, dtype=np.int32).reshape(B, S), np.zeros(B, np.int32)
PLACES = np.arange(S, dtype=np.int32) + START[:, None]  # the same positions, one per token
KINDS = ("KVCache", "PagedKVCache", "FloatCache")


@functools.cache
def load():
    name = checkpoint_folder.FOLDERS / "qwen2_ascendv1_static"
    model = checkpoints.load(name, progress=False)
    sizes = model.config.n_layers, model.config.n_kv_heads, model.config.head_dim
    assert sizes == (L, Nkv, D)
    return model


def arguments(kind):
    """tokens, cache, positions and block table of a call that passes."""
    model = load()
    if kind == "PagedKVCache":
        table = np.arange(2 * B, dtype=np.int32).reshape(B, 2)
        return TOKENS, new_paged_cache(model, 2 * B, 4), PLACES, table
    model = model if kind == "KVCache" else dataclasses.replace(model, cache_params=None)
    return TOKENS, new_cache(model, B, ROWS), START, None


def run(tokens, cache, positions, table):
    return forward(load(), tokens, cache, positions, block_table=table)


@pytest.mark.parametrize("kind", KINDS)
def test_takes_lists(kind):
    tokens, cache, positions, table = arguments(kind)
    expected, _ = run(tokens, cache, positions, table)
    table = None if table is None else table.tolist()
    logits, _ = run(tokens.tolist(), cache, positions.tolist(), table)
    np.testing.assert_array_equal(logits, expected)
    read = forward_float(load(), tokens.tolist()).logits
    np.testing.assert_array_equal(read, forward_float(load(), tokens).logits)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_takes_tokens_as_tokenizers_make_them(dtype):
    tokens, cache, positions, _ = arguments("KVCache")
    expected, _ = run(tokens, cache, positions, None)
    logits, _ = run(tokens.astype(dtype), cache, positions, None)
    np.testing.assert_array_equal(logits, expected)


BAD_TOKENS = [
    (None, TypeError, "`tokens` is required, got None"),
    (TOKENS[0], TypeError, r"`tokens` must be 2-D, got 1-D \[5\]"),
    ([0.5], TypeError, "`tokens` must have dtype int32, got float64"),
    (TOKENS.astype(np.float32), TypeError, "`tokens` must have dtype int32, got float32"),
    ([[2**31]], ValueError, "`tokens` must fit into int32, got 2147483648"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "error", "message"), BAD_TOKENS)
def test_tokens(tokens, error, message, kind):
    with pytest.raises(error, match=message):
        run(tokens, *arguments(kind)[1:])
    with pytest.raises(error, match=message):
        forward_float(load(), tokens)


BAD_POSITIONS = [
    ("KVCache", PLACES, TypeError, r"`positions` must be 1-D, got 2-D \[3, 5\]"),
    ("FloatCache", PLACES, TypeError, r"`positions` must be 1-D, got 2-D \[3, 5\]"),
    ("PagedKVCache", START, TypeError, r"`positions` must be 2-D, got 1-D \[3\]"),
    ("KVCache", START[:2], ValueError, r"`positions` must have shape \[B\] = \[3\], got \[2\]"),
    ("FloatCache", START[:2], ValueError, r"`positions` must have shape \[B\] = \[3\], got \[2\]"),
    ("KVCache", [0.0] * B, TypeError, "`positions` must have dtype int32, got float64"),
    ("FloatCache", START.astype(np.float32), TypeError, "dtype int32, got float32"),
    ("KVCache", None, TypeError, "`positions` is required, got None"),
]


@pytest.mark.parametrize(("kind", "positions", "error", "message"), BAD_POSITIONS)
def test_positions(kind, positions, error, message):
    tokens, cache, _, table = arguments(kind)
    with pytest.raises(error, match=message):
        run(tokens, cache, positions, table)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (0, ValueError, "`rows` must be at least 1, got 0"),
        (8.0, TypeError, "`rows` must be an int, got 8.0"),
        (np.full(1, 8), TypeError, r"`rows` must be an int, got array\(\[8\]\)"),
    ],
)
def test_rows(rows, error, message, kind):
    tokens, cache, positions, table = arguments(kind)
    with pytest.raises(error, match=message):
        forward(load(), tokens, cache, positions, block_table=table, rows=rows)


def int8_cache(layers=L, heads=Nkv, head_dim=D):
    ones = jnp.ones((heads, head_dim))
    return KVCache.create(B, ROWS, heads, head_dim, layers=layers, scale_k=ones, scale_v=ones)


BAD_CACHES = [
    (None, TypeError, "`cache` must be a KVCache, a PagedKVCache or a FloatCache, got NoneType"),
    (int8_cache(layers=3), ValueError,
     r"must have \[layers, Nkv, D\] = \[2, 2, 16\] as `model` has, got \[3, 2, 16\]"),
    (int8_cache(layers=1), ValueError, r"got \[1, 2, 16\]"),
    (int8_cache(layers=None), ValueError, r"got \[None, 2, 16\]"),
    (int8_cache(heads=1), ValueError, r"got \[2, 1, 16\]"),
    (int8_cache(head_dim=4), ValueError, r"got \[2, 2, 4\]"),
    (dataclasses.replace(int8_cache(), scale_k=None), TypeError, "`scale_k` is required, got None"),
    (FloatCache.create((3, B, ROWS, Nkv, D)), ValueError,
     r"`cache.k` .* \[L, B, C2, Nkv, D\] = \[2, 3, 8, 2, 16\], got \[3, 3, 8, 2, 16\]"),
    (FloatCache(*(jnp.zeros((L, B, rows, Nkv, D)) for rows in (ROWS, 7))), ValueError,
     r"`cache.v` must have shape .* = \[2, 3, 8, 2, 16\], got \[2, 3, 7, 2, 16\]"),
    (FloatCache.create((B, ROWS, Nkv, D)), TypeError, "`cache.k` must be 5-D, got 4-D"),
]  # fmt: skip


@pytest.mark.parametrize(("cache", "error", "message"), BAD_CACHES)
def test_caches(cache, error, message):
    with pytest.raises(error, match=message):
        run(TOKENS, cache, START, None)


def test_a_paged_cache_of_more_layers():
    tokens, cache, positions, table = arguments("PagedKVCache")
    doubled = jax.tree.map(lambda field: jnp.concatenate([field, field]), cache)
    doubled = dataclasses.replace(doubled, layers=2 * L)
    with pytest.raises(ValueError, match=r"= \[2, 2, 16\] as `model` has, got \[4, 2, 16\]"):
        run(tokens, doubled, positions, table)
