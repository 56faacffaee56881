"""Calls of the operator of given sizes: shapes alone, ones, or random numbers."""

import jax
import jax.numpy as jnp
import numpy as np


def arguments(
    B=2, S=1, Nq=2, Nkv=1, D=64, C1=2, C2=8, x_dtype=jnp.int32, dtype=None, cache_mode="contiguous",
    make=jax.ShapeDtypeStruct,
):  # fmt: skip
    """Keyword arguments of a valid call; `make(shape, dtype)` gives each array."""
    H = (Nq + 2 * Nkv) * D
    if dtype is None:
        dtype = jnp.bfloat16 if x_dtype == jnp.int32 else x_dtype
    tokens = (B,) if S is None else (B, S)
    tables = (B, D) if S is None else (B, S, 1, D)
    page = cache_mode == "page"
    call = {
        "x": make((*tokens, H), x_dtype),
        "cos": make(tables, dtype),
        "sin": make(tables, dtype),
        "k_cache": make((C1, C2, Nkv, D), jnp.int8),
        "v_cache": make((C1, C2, Nkv, D), jnp.int8),
        "indices": make(tokens if page else (B,), jnp.int32),
        "scale_k": make((Nkv, D), jnp.float32),
        "scale_v": make((Nkv, D), jnp.float32),
    }
    if x_dtype == jnp.int32:
        call["weight_scale"] = make((H,), jnp.float32)
    return call


def ones(**sizes):
    return arguments(make=lambda shape, dtype: jnp.ones(shape, dtype), **sizes)


def drawn(seed, **sizes):
    """NumPy arrays: codes of any value, small scales, and indices in and around the cache."""
    rng = np.random.default_rng(seed)

    def make(shape, dtype):
        if dtype == jnp.int8:
            return rng.integers(-128, 128, shape, np.int8)
        if dtype == jnp.int32:
            return rng.integers(-100, 100, shape).astype(np.int32)
        if dtype == jnp.float32:
            return rng.uniform(0.01, 0.02, shape).astype(np.float32)
        return rng.normal(size=shape).astype(dtype)

    return arguments(make=make, **sizes)
