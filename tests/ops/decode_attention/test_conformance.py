"""decode_attention against attention in float64 over the dequantised rows that are in use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_kvcache import KVCache, PagedKVCache, decode_attention

B, S, Nq, Nkv, D, C2, L = 3, 2, 4, 2, 16, 300, 2
BLOCK, BLOCKS, M = 24, 40, 12  # 288 rows per sequence: chunks of 128 rows straddle blocks


def fill(cache, rng, *, offsets=False):
    """The cache with random codes and scales, as NumPy sees it and as JAX does."""
    leaves = {
        n: rng.integers(-128, 128, cache.k_cache.shape, np.int8) for n in ("k_cache", "v_cache")
    }
    leaves |= {n: rng.uniform(0.002, 0.02, cache.scale_k.shape) for n in ("scale_k", "scale_v")}
    if offsets:
        leaves |= {n: rng.uniform(-20, 20, cache.scale_k.shape) for n in ("offset_k", "offset_v")}
    leaves = {
        n: np.asarray(a, np.float32) if a.dtype == np.float64 else a for n, a in leaves.items()
    }
    return jax.tree.map(
        jnp.asarray,
        type(cache)(**({"offset_k": None, "offset_v": None} | leaves), layers=cache.layers),
    )


def make(kind, rng, *, layers=None, offsets=False):
    ones = {"scale_k": np.ones((Nkv, D), np.float32), "scale_v": np.ones((Nkv, D), np.float32)}
    if kind == "paged":
        cache = PagedKVCache.create(BLOCKS, BLOCK, Nkv, D, layers=layers, **ones)
        table = rng.permutation(BLOCKS)[: B * M].reshape(B, M).astype(np.int32)
    else:
        cache = KVCache.create(B, C2, Nkv, D, layers=layers, **ones)
        table = None
    return fill(cache, rng, offsets=offsets), table


def rows_of(cache, table, layer, b):
    """k and v of sequence b in float64, [rows, Nkv, D] each."""
    out = []
    for codes, scale, offset in (
        (cache.k_cache, cache.scale_k, cache.offset_k),
        (cache.v_cache, cache.scale_v, cache.offset_v),
    ):
        codes, scale = np.asarray(codes, np.float64), np.asarray(scale, np.float64)
        offset = np.zeros_like(scale) if offset is None else np.asarray(offset, np.float64)
        if layer is not None:
            codes, scale, offset = codes[layer], scale[layer], offset[layer]
        codes = codes[b] if table is None else codes[table[b]].reshape(-1, Nkv, D)
        out.append((codes - offset) * scale)
    return out


def reference(q, cache, lengths, table=None, layer=None, scale=D**-0.5):
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        k, v = rows_of(cache, table, layer, b)
        for s in range(q.shape[1]):
            seen = min(lengths[b] - q.shape[1] + s + 1, len(k))
            if seen <= 0:
                continue
            for j in range(q.shape[2]):
                n = j // (q.shape[2] // Nkv)
                scores = scale * (k[:seen, n] @ q[b, s, j].astype(np.float64))
                weights = np.exp(scores - scores.max())
                out[b, s, j] = weights @ v[:seen, n] / weights.sum()
    return out


attend = jax.jit(decode_attention, static_argnames="scale")


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


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_no_copy_of_the_cache_or_of_a_layer(kind):
    """The compiled program's temporaries are chunks, whatever the cache's size."""
    layer_bytes = 64 * 2048 * Nkv * D
    scales = jax.ShapeDtypeStruct((L, Nkv, D), jnp.float32)
    shape = (L, 64, 2048, Nkv, D) if kind == "contiguous" else (L, 4096, 32, Nkv, D)
    codes = jax.ShapeDtypeStruct(shape, jnp.int8)
    cls = KVCache if kind == "contiguous" else PagedKVCache
    cache = cls(codes, codes, scales, scales, scales, scales, L)
    table = None if kind == "contiguous" else jax.ShapeDtypeStruct((B, 64), jnp.int32)
    q = jax.ShapeDtypeStruct((B, 1, Nq, D), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((B,), jnp.int32)
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = attend.lower(q, cache, lengths, block_table=table, layer=layer).compile()
    chunk_bytes = B * 128 * Nkv * D * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * chunk_bytes < layer_bytes


def refused():
    rng = np.random.default_rng(0)
    flat, _ = make("contiguous", rng)
    paged, table = make("paged", rng)
    layered, _ = make("contiguous", rng, layers=L)
    q, lengths = np.zeros((B, S, Nq, D), np.float32), np.zeros(B, np.int32)
    wide = np.zeros((B + 1, S, Nq, D), np.float32)
    return [
        (TypeError, "`cache` must be a KVCache or a PagedKVCache, got dict", (q, {}, lengths), {}),
        (
            TypeError,
            "`q` must have dtype .* got int32",
            (q.astype(np.int32), flat, lengths),
            {},
        ),
        (TypeError, r"`q` must be 4-D, got 3-D \[3, 2, 4\]", (q[..., 0], flat, lengths), {}),
        (ValueError, r"D = 16 .* Nkv = 2, got \[3, 2, 4, 8\]", (q[..., :8], flat, lengths), {}),
        (ValueError, r"Nkv = 2, got \[3, 2, 3, 16\]", (q[:, :, :3], flat, lengths), {}),
        (
            TypeError,
            "`lengths` must have dtype int32, got float",
            (q, flat, lengths * 1.0),
            {},
        ),
        (ValueError, "`lengths` must have one entry per .* = 3, got 2", (q, flat, lengths[:2]), {}),
        (
            ValueError,
            "as many sequences as the cache = 3, got 4",
            (wide, flat, np.zeros(4, np.int32)),
            {},
        ),
        (TypeError, "`layer` must be None", (q, flat, lengths), {"layer": 0}),
        (TypeError, "`layer` is required for a cache with 2 layers", (q, layered, lengths), {}),
        (
            TypeError,
            "`layer` must be an integer scalar, got ",
            (q, layered, lengths),
            {"layer": 0.0},
        ),
        (
            TypeError,
            "`block_table` must be None for a KVCache",
            (q, flat, lengths),
            {"block_table": table},
        ),
        (TypeError, "`block_table` is required", (q, paged, lengths), {}),
        (
            TypeError,
            "`block_table` must be 2-D, got 1-D",
            (q, paged, lengths),
            {"block_table": table[0]},
        ),
        (
            ValueError,
            "`block_table` must have one entry .* = 3, got 2",
            (q, paged, lengths),
            {"block_table": table[:2]},
        ),
        (
            ValueError,
            "`block_table` must have at least one column",
            (q, paged, lengths),
            {"block_table": table[:, :0]},
        ),
    ]


@pytest.mark.parametrize(("error", "message", "arguments", "options"), refused())
def test_refuses(error, message, arguments, options):
    with pytest.raises(error, match=message):
        decode_attention(*arguments, **options)
