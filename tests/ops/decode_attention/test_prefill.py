"""Prompts: no worse than attention in bfloat16, and the same in chunks as at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention import BF16, Call, assert_close, in_float64

from jax_kvcache import KVCache, PagedKVCache, decode_attention

each_implementation = pytest.mark.parametrize("implementation", ["xla", "ffi"])
each_kind = pytest.mark.parametrize("kind", ["contiguous", "paged"])
NOWHERE = np.iinfo(np.int32).min


@jax.jit
def in_bfloat16(q, k, v, positions):
    """What a bfloat16 cache of the same K and V gives; q [B, S, Nq, D], positions [B, S]."""
    seen = jnp.arange(k.shape[1])[None, None, None, :] <= positions[:, None, :, None]
    return jax.nn.dot_product_attention(q, k, v, mask=seen)


def sequences(cache, table):
    """K and V of every sequence in float32, [B, rows, Nkv, D]: exact where a scale is."""
    kv = cache.dequantize()
    return [a if table is None else a[table].reshape(len(table), -1, *a.shape[-2:]) for a in kv]


@each_implementation
@each_kind
@pytest.mark.parametrize(("S", "before"), [(64, 0), (100, 412), (256, 0), (512, 0)])
def test_no_worse_than_bfloat16(S, before, kind, implementation):
    """`before` rows are in the cache already; the error is that of either, against float64."""
    call = Call(kind=kind, B=1, S=S, Nq=4, Nkv=2, D=64, rows=before + S, block=16, dtype=BF16)
    q, cache, keywords = call.draw()
    keywords["positions"] = np.arange(before, before + S, dtype=np.int32)[None]
    k, v = (a.astype(BF16) for a in sequences(cache, keywords.get("block_table")))
    expected, _, _, _ = in_float64(q, cache, **keywords)
    out = jax.jit(lambda: decode_attention(q, cache, implementation=implementation, **keywords))()
    other = in_bfloat16(q, k, v, keywords["positions"])
    assert out.dtype == other.dtype == jnp.bfloat16
    ours, theirs = (np.abs(np.asarray(a, np.float64) - expected) for a in (out, other))
    assert ours.max() <= theirs.max()
    assert np.sqrt((ours**2).mean()) <= np.sqrt((theirs**2).mean())


B, S, ROWS, BLOCK, Nq, Nkv, D, L = 3, 300, 320, 16, 4, 2, 32, 2
LENGTHS = np.array([[300], [171], [0]])


def prompts(kind):
    """Tokens of prompts of different lengths, and where each of them goes.

    Returns:
      x, cos, sin and the positions [B, S], -1 for padding: after the prompt for a contiguous cache,
      and anywhere in the rows of x for a paged one.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((B, S, (Nq + 2 * Nkv) * D)).astype(np.float32)
    angles = rng.uniform(-3, 3, (B, S, 1, D // 2))
    cos, sin = (np.tile(f(angles), 2).astype(np.float32) for f in (np.cos, np.sin))
    step = np.arange(S)
    positions = np.where(step < LENGTHS, step, -1)
    if kind == "paged":
        for row, (length,) in zip(positions, LENGTHS, strict=True):
            row[:] = -1
            row[np.sort(rng.permutation(S)[:length])] = np.arange(length)
    return x, cos, sin, positions.astype(np.int32)


def empty(kind):
    """A cache with layers, and its block table."""
    scale = np.full((L, Nkv, D), 0.03, np.float32)
    scales = {"layers": L, "scale_k": scale, "scale_v": scale}
    if kind == "contiguous":
        return KVCache.create(B, ROWS, Nkv, D, **scales), None
    entries = ROWS // BLOCK
    table = np.random.default_rng(1).permutation(B * entries).reshape(B, entries)
    return PagedKVCache.create(B * entries, BLOCK, Nkv, D, **scales), table.astype(np.int32)


@each_implementation
@each_kind
@pytest.mark.parametrize("chunk", [128, 37])
def test_in_chunks_as_at_once(chunk, kind, implementation):
    """Each chunk is written, and then attends to all that is there so far."""
    x, cos, sin, positions = prompts(kind)
    cache, table = empty(kind)
    where = {"block_table": table, "layer": 1, "implementation": implementation}

    @jax.jit
    def step(cache, x, cos, sin, starts, positions):
        q, cache = cache.update(x, cos, sin, starts, **where)
        return q, decode_attention(q, cache, positions=positions, **where), cache

    def prefill(chunk):
        after, parts = cache, []
        for first in range(0, S, chunk):
            new = slice(first, first + chunk)
            own = positions[:, new]
            # A contiguous cache takes the row of a chunk's first token, and none for padding alone.
            starts = np.where(own[:, 0] >= 0, own[:, 0], NOWHERE) if table is None else own
            q, out, after = step(after, x[:, new], cos[:, new], sin[:, new], starts, own)
            parts.append((q, out))
        return *(np.concatenate(part, axis=1) for part in zip(*parts, strict=True)), after

    q, out, after = prefill(chunk)
    whole_q, whole, at_once = prefill(S)
    np.testing.assert_array_equal(q, whole_q)
    for name in ("k_cache", "v_cache"):
        codes, wanted = np.asarray(getattr(after, name)), np.asarray(getattr(at_once, name))
        if table is None:  # what padding wrote is past the prompt's end
            in_use = (np.arange(ROWS) < LENGTHS)[None, ..., None, None]
            codes, wanted = codes * in_use, wanted * in_use
        assert np.count_nonzero(wanted[1]) > 0.9 * LENGTHS.sum() * Nkv * D
        np.testing.assert_array_equal(codes, wanted)
    expected, _, score, value = in_float64(
        q, at_once, positions=positions, block_table=table, layer=1
    )
    for results in (out, whole):
        assert_close(results, expected, value, score)
    assert not out[positions < 0].any()
