"""Numbers that would wrap, narrow or vanish: they reach no foreign row, and NaN stays NaN."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_kvcache
from jax_kvcache import KVCache, PagedKVCache, decode_attention, slots_from_block_table

SCALE = np.full((1, 2), 0.02, np.float32)
X, COS = np.ones((1, 1, 6), np.float32), np.ones((1, 1, 1, 2), np.float32)
START = np.zeros(1, np.int32)


def cache(layers=None, length=8):
    return KVCache.create(1, length, 1, 2, layers=layers, scale_k=SCALE, scale_v=SCALE)


def written(cache):
    return np.argwhere(np.asarray(cache.k_cache.any((-1, -2)))).tolist()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32])
@pytest.mark.parametrize(("layers", "layer"), [(2, 7), (200, 5), (300, 5), (2, -1)])
def test_a_layer_of_any_integer_dtype_is_that_layer_or_none(dtype, layers, layer):
    layer = np.asarray(layer).astype(dtype)  # -1 is a large number where there is no sign
    update = jax.jit(lambda layer: cache(layers).update(X, COS, COS, START, layer=layer)[1])
    expected = [[int(layer), 0, 0]] if 0 <= layer < layers else []
    assert written(update(layer)) == expected


def test_a_layer_that_would_wrap_around_writes_nothing():
    """In uint8, -1 is 255, and 255 layers of 16843010 rows wrap around to row 254."""
    big = cache(2, 16843010)
    update = jax.jit(lambda layer: big.update(X, COS, COS, START, layer=layer)[1])
    assert written(update(np.uint8(7))) == []


@pytest.mark.parametrize("layer", [2, np.int64(2), np.int64(-1), np.uint64(2**63), 2**32 + 1])
def test_a_layer_out_of_range_is_refused(layer):
    with pytest.raises(ValueError, match=r"`layer` must be in \[0, 2\), got"):
        cache(2).update(X, COS, COS, START, layer=layer)
    with pytest.raises(ValueError, match=r"`layer` must be in \[0, 2\), got"):
        decode_attention(np.ones((1, 1, 1, 2), np.float32), cache(2), START, layer=layer)


@pytest.mark.parametrize("layer", [True, 1.0, "1"])
def test_a_layer_that_is_no_integer_is_refused(layer):
    with pytest.raises(TypeError, match="`layer` must be an integer scalar, got"):
        cache(2).update(X, COS, COS, START, layer=layer)


WIDE = np.array([2**32 + 3])


def test_int64_is_refused_and_not_narrowed():
    paged = PagedKVCache.create(4, 2, 1, 2, scale_k=SCALE, scale_v=SCALE)
    table = np.zeros((1, 1), np.int32)
    q = np.ones((1, 1, 1, 2), np.float32)
    for name, call in {
        "positions": lambda: cache().update(X, COS, COS, WIDE),
        "block_table": lambda: paged.update(X, COS, COS, table, block_table=WIDE[None]),
        "lengths": lambda: decode_attention(q, cache(), WIDE),
    }.items():
        with pytest.raises(TypeError, match=f"`{name}` must have dtype int32, got int64"):
            call()
    with pytest.raises(TypeError, match="`positions` must have dtype int32, got int64"):
        slots_from_block_table(table, WIDE[None], 2)
    with pytest.raises(ValueError, match="`positions` must fit into int32, got 4294967299"):
        cache().update(X, COS, COS, [2**32 + 3])
    with pytest.raises(ValueError, match="`positions` must fit into int32, got 4294967299"):
        jax_kvcache.rope_tables(WIDE[None], 2)
    assert written(cache().update(X, COS, COS, [3])[1]) == [[0, 3]]


def test_a_cache_made_by_hand_must_fit_itself():
    wrong = dataclasses.replace(cache(2), layers=3)
    with pytest.raises(ValueError, match="`k_cache` must have `layers` = 3 layers, got 2"):
        wrong.update(X, COS, COS, START, layer=0)
    wrong = dataclasses.replace(cache(2), v_cache=cache(1).v_cache)
    with pytest.raises(ValueError, match="`v_cache` must have shape"):
        wrong.update(X, COS, COS, START, layer=0)
    wrong = dataclasses.replace(cache(), k_cache=jnp.zeros((1, 8, 1, 2)))
    with pytest.raises(TypeError, match="`k_cache` must have dtype int8, got float32"):
        decode_attention(np.ones((1, 1, 1, 2), np.float32), wrong, START)
