"""The benchmark's shapes of attention, and what is compared on each: one step per contestant."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvcache.caches import KVCache
from jax_kvcache.cli.bench_ort import GroupQueryAttention
from jax_kvcache.cli.bench_steps import READ
from jax_kvcache.ops.decode_attention.api import decode_attention
from jax_kvcache.ops.implementation import Implementation
from jax_kvcache.rope import rope_tables

D = 128


class AttentionCase(NamedTuple):
    """S new tokens in each of B sequences of so many rows, float32 q; the last row is the newest.

    `lengths`: the rows that each sequence has, where not all have the same.
    """

    B: int
    rows: int
    S: int = 1
    Nq: int = 32
    Nkv: int = 8
    lengths: tuple[int, ...] = ()

    @property
    def codes(self) -> int:
        """Bytes of codes that a step must read: the rows that are in use, of K and of V."""
        return 2 * self.Nkv * D * sum(self.all_lengths)

    @property
    def all_lengths(self) -> tuple[int, ...]:
        """The rows of each sequence."""
        return self.lengths or (self.rows,) * self.B

    @property
    def is_decode(self) -> bool:
        """Whether it is a step of one token per sequence, which the whole-step contestants time."""
        return self.S == 1


ATTENTION_CASES = {
    "attend-1x2048": AttentionCase(1, 2048),
    "attend-1x8192": AttentionCase(1, 8192),
    "attend-8x2048": AttentionCase(8, 2048),
    "attend-32x1024": AttentionCase(32, 1024),
    "attend-8x2048-g1": AttentionCase(8, 2048, Nq=8),
    "attend-16+8192": AttentionCase(2, 8192, lengths=(16, 8192)),
    "attend-8x2048-s8": AttentionCase(8, 2048, S=8),
    "attend-4x2048-s128": AttentionCase(4, 2048, S=128),
    "prefill-64": AttentionCase(1, 64, S=64),
    "prefill-512": AttentionCase(1, 512, S=512),
    "prefill-2048": AttentionCase(1, 2048, S=2048),
    "prefill-64-of-8192": AttentionCase(1, 8192, S=64),
    "prefill-512-of-8192": AttentionCase(1, 8192, S=512),
    "prefill-2048-of-8192": AttentionCase(1, 8192, S=2048),
}


def int8_cache(case: AttentionCase) -> KVCache:
    """A cache of random codes, with scales per channel."""
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.01, 0.02, (case.Nkv, D)).astype(np.float32)
    shape = (case.B, case.rows, case.Nkv, D)
    k_codes, v_codes = (jnp.asarray(rng.integers(-128, 128, shape, np.int8)) for _ in "kv")
    scale_k, scale_v = jnp.asarray(scale), jnp.asarray(scale)
    return KVCache(k_codes, v_codes, scale_k, scale_v, None, None, None)


def float_cache(case: AttentionCase, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """K and V of the same shape as numbers."""
    shape = (case.B, case.rows, case.Nkv, D)
    return jnp.ones(shape, dtype), jnp.zeros(shape, dtype)


def make_inputs(case: AttentionCase) -> dict[str, jax.Array]:
    """The new tokens' projection, float32, and how many rows each sequence then has."""
    rng = np.random.default_rng(1)
    H = (case.Nq + 2 * case.Nkv) * D
    x = rng.standard_normal((case.B, case.S, H)).astype(np.float32)
    return {"x": jnp.asarray(x), "lengths": jnp.asarray(case.all_lengths, jnp.int32)}


def heads_of(case: AttentionCase, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k and v, [B, S, N, D] each, as they lie in x."""
    cuts = (case.Nq * D, (case.Nq + case.Nkv) * D)
    parts = jnp.split(x, cuts, axis=-1)
    q, k, v = (part.reshape(*part.shape[:2], -1, D) for part in parts)
    return q, k, v


def ours(case: AttentionCase, whole: bool, implementation: Implementation) -> Callable:
    """Attention over the int8 cache, or a whole step: the write before it."""

    def step(cache: KVCache, inputs: dict[str, jax.Array]):
        lengths = inputs["lengths"]
        q, _, _ = heads_of(case, inputs["x"])
        if whole:
            first = lengths - case.S
            steps = first[:, None] + jnp.arange(case.S, dtype=jnp.int32)
            cos, sin = rope_tables(steps, D, 10_000.0, jnp.float32)
            q, cache = cache.update(inputs["x"], cos, sin, first, implementation=implementation)
        return decode_attention(q, cache, lengths, implementation=implementation), cache

    return step


def float_step(case: AttentionCase, whole: bool, dtype: Any) -> Callable:
    """`jax.nn.dot_product_attention` over a float cache, or a whole step: the write before it."""

    def step(cache: tuple[jax.Array, jax.Array], inputs: dict[str, jax.Array]):
        lengths = inputs["lengths"]
        q, k, v = heads_of(case, inputs["x"].astype(dtype))
        if whole:
            first = lengths - case.S
            rows = first[:, None] + jnp.arange(case.S, dtype=jnp.int32)
            cos, sin = rope_tables(rows, D, 10_000.0, dtype)
            q, k = (_rotate(head, cos, sin) for head in (q, k))
            batch = jnp.arange(case.B)[:, None]
            cache = cache[0].at[batch, rows].set(k), cache[1].at[batch, rows].set(v)
        attend: Any = jax.nn.dot_product_attention
        return attend(q, *cache, **_mask(case, lengths)), cache

    return step


def _mask(case: AttentionCase, lengths: jax.Array) -> dict[str, jax.Array]:
    """Which rows each query sees, as cheaply as the function takes it."""
    if case.S == 1:
        return {"key_value_seq_lengths": lengths}
    last = lengths[:, None] - case.S + jnp.arange(case.S, dtype=jnp.int32)
    rows = jnp.arange(case.rows, dtype=jnp.int32)
    return {"mask": (rows[None, None, :] <= last[:, :, None])[:, None]}


def _rotate(head: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    low, high = jnp.split(head, 2, axis=-1)
    return head * cos + jnp.concatenate([-high, low], axis=-1) * sin


def read(cache: KVCache, inputs: dict[str, jax.Array]):
    """A plain read of both caches."""
    del inputs
    total = jax.ffi.ffi_call(READ, jax.ShapeDtypeStruct((1,), jnp.uint32))
    return total(cache.k_cache, cache.v_cache), cache


def contestants(case: AttentionCase) -> dict[str, tuple[Callable, Any, list[Any]]]:
    """Of each contestant the step, its state and its inputs; a step donates the state to itself."""
    inputs = [make_inputs(case)]
    jit = functools.partial(jax.jit, donate_argnums=0)
    found: dict[str, tuple[Callable, Any, list[Any]]] = {}
    found["ffi"] = jit(ours(case, False, "ffi")), int8_cache(case), inputs
    found["xla"] = jit(ours(case, False, "xla")), int8_cache(case), inputs
    for name, dtype in (("bfloat16", jnp.bfloat16), ("float32", jnp.float32)):
        found[name] = jit(float_step(case, False, dtype)), float_cache(case, dtype), inputs
    found["read"] = jit(read), int8_cache(case), inputs
    if not case.is_decode:
        return found
    found["step ffi"] = jit(ours(case, True, "ffi")), int8_cache(case), inputs
    for name, dtype in (("bfloat16", jnp.bfloat16), ("float32", jnp.float32)):
        found[f"step {name}"] = jit(float_step(case, True, dtype)), float_cache(case, dtype), inputs
    peer = GroupQueryAttention.available(case.B, case.rows, case.Nq, case.Nkv, D)
    if peer is not None:
        host = jax.tree.map(np.asarray, inputs[0])
        found["step onnxruntime"] = peer.step, None, [host]
    return found
