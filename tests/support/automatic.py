"""Decode steps in automatic mode over a 2 x 2 mesh, with tokens and caches in several layouts."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_kvcache import KVCache, decode_attention, rope_tables


class Step(NamedTuple):
    """Sizes, the optionals, and the mesh axes of the tokens, sequences and heads."""

    S: int
    D: int
    optionals: bool
    tokens: str | None
    sequences: str | None
    heads: str | None


STEPS = {
    "tokens replicated": Step(1, 8, False, None, "dp", "tp"),
    "tokens replicated, optionals": Step(1, 8, True, None, "dp", "tp"),
    "tokens replicated, a prompt": Step(16, 64, True, None, "dp", "tp"),
    "tokens over dp": Step(1, 8, False, "dp", "dp", "tp"),
    "heads over tp": Step(1, 8, False, None, None, "tp"),
    "tokens over tp": Step(1, 8, True, "tp", "dp", None),
}
B, Nkv, Nq = 4, 2, 4


def decode(cache, x, positions, weight_scale, optionals, q_sharding=None):
    S, D = x.shape[1], cache.k_cache.shape[-1]
    cos, sin = rope_tables(positions[:, None] + jnp.arange(S, dtype=jnp.int32)[None], D)
    q, cache = cache.update(x, cos, sin, positions, weight_scale=weight_scale, **optionals)
    if q_sharding is not None:
        q = jax.lax.with_sharding_constraint(q, q_sharding)
    return decode_attention(q, cache, positions + S), cache


def mesh():
    return jax.make_mesh((2, 2), ("dp", "tp"), (AxisType.Auto,) * 2)


def over_devices(step):
    """`decode`, jitted, with q where the cache is: tokens that are elsewhere are cut for it."""
    where = NamedSharding(mesh(), P(step.sequences, None, step.heads))
    return jax.jit(functools.partial(decode, q_sharding=where))


def arguments(step):
    """The arguments of `decode` on one device."""
    H = (Nq + 2 * Nkv) * step.D
    rng = np.random.default_rng(1)
    scale = np.full((Nkv, step.D), 0.02, np.float32)
    optionals = {}
    if step.optionals:
        optionals["activation_scale"] = rng.uniform(0.5, 1, (B, step.S)).astype(np.float32)
        optionals["bias"] = rng.normal(size=H).astype(np.float32)
    return (
        KVCache.create(B, 4 * step.S + 16, Nkv, step.D, scale_k=scale, scale_v=scale),
        rng.integers(-30_000, 30_000, (B, step.S, H)).astype(np.int32),
        np.array([0, 3, 9, 1], np.int32),
        np.full(H, 1e-4, np.float32),
        optionals,
    )


def placed(step):
    """The arguments over four devices."""
    codes, channels, tokens = P(step.sequences, None, step.heads), P(step.heads), P(step.tokens)
    cache, x, positions, weight_scale, optionals = arguments(step)
    where = (
        KVCache(codes, codes, channels, channels, None, None, None),
        tokens,
        tokens,
        P(),
        {name: tokens if name == "activation_scale" else P() for name in optionals},
    )
    values = (cache, x, positions, weight_scale, optionals)
    return jax.tree.map(
        lambda a, spec: jax.device_put(a, NamedSharding(mesh(), spec)), values, where
    )
