"""Decode attention in float64, the calls of every implementation, and how close they must be."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_kvcache import KVCache, PagedKVCache, decode_attention

BF16 = ml_dtypes.bfloat16


def attention(q, k, v, positions, *, scale, window=None, soft_cap=None, sinks=None, there=None):
    """One sequence: q [S, Nq, D], k and v [rows, Nkv, D] float64, positions [S].

    Returns:
      out [S, Nq, D], lse [S, Nq] and the largest |score|, all float64.
    """
    steps, q_heads, _ = q.shape
    rows, group = np.arange(len(k)), q_heads // k.shape[1]
    there = np.ones(len(k), bool) if there is None else there
    out, lse, largest = np.zeros(q.shape), np.full((steps, q_heads), -np.inf), 0.0
    for s, position in enumerate(map(int, positions)):
        seen = there & (rows <= position)
        if window is not None:
            seen &= rows > position - window
        if position < 0 or not seen.any():
            continue
        for head in range(q_heads):
            scores = (k[seen, head // group] @ q[s, head].astype(np.float64)) * scale
            largest = max(largest, np.abs(scores).max())
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            peak = scores.max()
            weights = np.exp(scores - peak)
            lse[s, head] = peak + np.log(weights.sum())
            total = weights.sum()
            if sinks is not None:
                total += np.exp(float(sinks[head]) - peak)
            out[s, head] = weights @ v[seen, head // group] / total
    return out, lse, largest


class Call(NamedTuple):
    """One call: its form, and how its numbers are drawn."""

    kind: str = "contiguous"
    B: int = 3
    S: int = 2
    Nq: int = 4
    Nkv: int = 2
    D: int = 16
    rows: int = 40  # of each sequence
    block: int = 8  # rows per block of a paged cache
    layers: int | None = None
    dtype: Any = np.float32  # of q
    offset: float = 0.0  # the largest offset, in codes; 0: no offsets
    spread: float = 1.0  # the largest scale over the least
    scale: float | None = None
    q_size: float = 1.0
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    holes: bool = False  # entries of the block table that name no block
    full: bool = False  # every query sees every row

    def draw(self, seed=0):
        """The arguments of `decode_attention`: (q, cache, keyword arguments)."""
        rng = np.random.default_rng(seed)
        layers = () if self.layers is None else (self.layers,)
        entries = -(-self.rows // self.block)
        blocks = self.B * entries + 2
        sizes = (self.B, self.rows) if self.kind == "contiguous" else (blocks, self.block)

        def codes():
            return jnp.asarray(
                rng.integers(-128, 128, (*layers, *sizes, self.Nkv, self.D), np.int8)
            )

        def parameter(low, high):
            shape = (*layers, self.Nkv, self.D)
            return jnp.asarray(rng.uniform(low, high, shape).astype(np.float32))

        scales = [parameter(0.02, 0.02 * self.spread) for _ in "kv"]
        offsets = [parameter(-self.offset, self.offset) if self.offset else None for _ in "kv"]
        cls = KVCache if self.kind == "contiguous" else PagedKVCache
        cache = cls(codes(), codes(), *scales, *offsets, self.layers)
        q = self.q_size * rng.standard_normal((self.B, self.S, self.Nq, self.D))
        positions = rng.integers(-2, self.rows + 3, (self.B, self.S)).astype(np.int32)
        if self.full:
            positions[:] = self.rows - 1
        keywords = {"positions": positions, "scale": self.scale, "window": self.window}
        keywords |= {"soft_cap": self.soft_cap}
        if self.sinks:
            keywords["sinks"] = rng.standard_normal(self.Nq).astype(np.float32)
        if self.kind == "paged":
            table = rng.permutation(blocks)[: self.B * entries].reshape(self.B, entries)
            if self.holes:
                table[:, 1::3] = rng.choice([-1, blocks, 2**31 - 1, -(2**31)], table[:, 1::3].shape)
            keywords["block_table"] = table.astype(np.int32)
        if self.layers is not None:
            keywords["layer"] = self.layers - 1
        return jnp.asarray(q.astype(self.dtype)), cache, keywords


def in_float64(q, cache, *, positions, block_table=None, layer=None, **options):
    """out, lse, the largest |score| and the largest |value| of a call, in float64."""
    kv = []
    for codes, scale, offset in (
        (cache.k_cache, cache.scale_k, cache.offset_k),
        (cache.v_cache, cache.scale_v, cache.offset_v),
    ):
        codes, scale = np.asarray(codes, np.float64), np.asarray(scale, np.float64)
        offset = np.zeros_like(scale) if offset is None else np.asarray(offset, np.float64)
        if layer is not None:
            codes, scale, offset = codes[layer], scale[layer], offset[layer]
        kv.append((codes - offset) * scale)
    if options.get("scale") is None:
        options["scale"] = q.shape[-1] ** -0.5
    outs, lses, largest = [], [], 0.0
    for b in range(q.shape[0]):
        k, v, there = kv[0], kv[1], None
        if block_table is None:
            k, v = k[b], v[b]
        else:
            valid = (block_table[b] >= 0) & (block_table[b] < len(k))
            there = np.repeat(valid, k.shape[1])
            k, v = (a[np.where(valid, block_table[b], 0)].reshape(-1, *a.shape[2:]) for a in (k, v))
        out, lse, score = attention(
            np.asarray(q[b], np.float64), k, v, positions[b], there=there, **options
        )
        outs.append(out), lses.append(lse)
        largest = max(largest, score)
    return np.stack(outs), np.stack(lses), largest, np.abs(kv[1]).max()


def assert_close(actual, expected, largest_value, largest_score, where=""):
    """The accuracy that the operator promises, and one rounding to the dtype."""
    allowed = 1e-5 + 2.0**-22 * largest_score
    if actual.dtype != np.float32:
        allowed += float(ml_dtypes.finfo(actual.dtype).eps)
    error = np.abs(np.asarray(actual, np.float64) - expected).max(initial=0.0) / largest_value
    assert error <= allowed, f"{where}: {error:.2e} > {allowed:.2e}"


def check(call, implementation, *, seed=0, transform=jax.jit, lse_error=2.0**-21):
    """Runs a call and compares its results with float64's.

    Args:
      call: the call.
      implementation: as for `decode_attention`.
      seed: of its numbers.
      transform: makes of a function the one that is called.
      lse_error: what the log-sum-exp's error may be for each unit of the largest score.
    """
    q, cache, keywords = call.draw(seed)

    def run(q, cache):
        return decode_attention(
            q, cache, return_lse=True, implementation=implementation, **keywords
        )

    out, lse = transform(run)(q, cache)
    expected, expected_lse, score, value = in_float64(q, cache, **keywords)
    assert out.dtype == q.dtype
    assert lse.dtype == np.float32
    assert_close(out, expected, value, score, "out")
    seen = np.isfinite(expected_lse)
    np.testing.assert_array_equal(np.asarray(lse) == -np.inf, ~seen)
    error = np.abs(np.asarray(lse)[seen] - expected_lse[seen]).max(initial=0.0)
    assert error <= 1e-5 + lse_error * (score + np.log(call.rows)), error
    assert not np.asarray(out, np.float32)[~seen].any()
    alone = transform(lambda q, cache: run(q, cache)[0])(q, cache)
    np.testing.assert_array_equal(np.asarray(alone), np.asarray(out))


CALLS = {
    "one token": Call(S=1),
    "several tokens": Call(S=5),
    "one head each": Call(Nq=2, Nkv=2),
    "odd head counts": Call(Nq=9, Nkv=3, D=8),
    "odd head size": Call(D=10),
    "large heads": Call(D=192, B=1),
    "float16": Call(dtype=np.float16),
    "bfloat16": Call(dtype=BF16),
    "offsets": Call(offset=5.0),
    "offsets of 100 codes": Call(offset=100.0, spread=2.0, rows=300),
    "window": Call(window=7, S=3),
    "window of one row": Call(window=1),
    "soft cap": Call(soft_cap=2.0, offset=9.0),
    "sinks": Call(sinks=True, offset=9.0),
    "everything": Call(window=11, soft_cap=3.0, sinks=True, offset=20.0, layers=2),
    "one of many layers": Call(layers=3, offset=3.0),
    "long": Call(B=2, rows=3000, S=1),
    "long, window": Call(B=2, rows=3000, S=2, window=130),
    "very long": Call(B=1, Nq=2, Nkv=1, rows=100_000, S=1, full=True, offset=100.0, spread=2.0),
    "large scores": Call(q_size=300.0, rows=200),
    "tiny scale": Call(scale=1e-6),
    "prompt": Call(B=2, S=300, rows=310),
    "paged": Call(kind="paged"),
    "paged, one row per block": Call(kind="paged", block=1, rows=30),
    "paged, large blocks": Call(kind="paged", block=700, rows=2100, B=2),
    "paged, missing blocks": Call(kind="paged", holes=True, rows=90),
    "paged, everything": Call(
        kind="paged", holes=True, rows=90, window=20, soft_cap=3.0, sinks=True, offset=20.0,
        layers=2, S=3,
    ),
    "paged, long": Call(kind="paged", block=16, rows=2000, B=2, S=1, dtype=BF16),
    "paged, prompt": Call(kind="paged", block=16, rows=320, B=2, S=300, window=64),
}  # fmt: skip
