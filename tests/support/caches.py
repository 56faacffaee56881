"""Small caches of both kinds, and calls of their `update`."""

import ml_dtypes
import numpy as np

from jax_kvcache import KVCache, PagedKVCache

B, S, Nq, Nkv, D, C2, L = 3, 2, 4, 2, 16, 12, 3
BLOCK, BLOCKS = 4, 8
H = (Nq + 2 * Nkv) * D
INT32 = np.iinfo(np.int32)


def tokens(rng, batch=B, steps=S):
    """The arguments of update that hold the tokens."""
    return {
        "x": rng.integers(-20000, 20000, (batch, steps, H), np.int32),
        "cos": rng.normal(size=(batch, steps, 1, D)).astype(ml_dtypes.bfloat16),
        "sin": rng.normal(size=(batch, steps, 1, D)).astype(ml_dtypes.bfloat16),
        "weight_scale": rng.uniform(1e-3, 2e-3, H).astype(np.float32),
        "activation_scale": rng.uniform(0.5, 2, (batch, steps)).astype(np.float32),
        "bias": rng.normal(size=H).astype(np.float32),
    }


def make(kind, rng, *, layers=None, offsets=False, batch=B):
    heads = (Nkv, D) if layers is None else (layers, Nkv, D)
    params = {n: rng.uniform(0.2, 0.4, heads).astype(np.float32) for n in ("scale_k", "scale_v")}
    if offsets:
        for name in ("offset_k", "offset_v"):
            params[name] = rng.uniform(-9, 9, heads).astype(np.float32)
    sizes = (batch, C2) if kind == "contiguous" else (BLOCKS, BLOCK)
    cls = KVCache if kind == "contiguous" else PagedKVCache
    return cls.create(*sizes, Nkv, D, layers=layers, **params)


# Blocks, positions and the slots that they mean, some of them outside the table or the cache.
TABLE = np.array([[5, 2, -1], [0, 7, 3], [1, BLOCKS, INT32.max]], np.int32)
POSITIONS = np.array([[3, 4], [11, 12], [5, -1]], np.int32)
SLOTS = np.array([[23, 8], [15, -1], [33, -1]], np.int32)  # 33 is past the 32 rows
