"""Small caches of random codes and scales for attention, and what it computes over them."""

import jax
import jax.numpy as jnp
import numpy as np

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
