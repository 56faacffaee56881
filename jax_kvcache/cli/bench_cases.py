"""The benchmark's shapes of the write: batches of common models, and inputs for them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    """One shape: int32 x, bfloat16 tables, every optional, k and v as outputs."""

    B: int
    S: int
    Nq: int
    Nkv: int
    D: int
    cache_mode: str
    C1: int
    C2: int
    form: str = "call"  # or "vmap" over that many calls, or "layers": a scan over a layered KVCache
    calls: int = 1

    @property
    def H(self) -> int:
        """Width of x: (Nq + 2*Nkv) * D."""
        return (self.Nq + 2 * self.Nkv) * self.D

    @property
    def bytes_moved(self) -> int:
        """Bytes that one step must read and write."""
        tokens, kv = self.B * self.S, self.Nkv * self.D
        outputs = self.Nq * self.D if self.form == "layers" else self.H
        read = tokens * (4 * self.H + 2 * 2 * self.D + 4 + 4) + 4 * (2 * self.H + 4 * kv)
        written = tokens * (2 * outputs + 2 * kv)
        return self.calls * (read + written)

    @property
    def bytes_per_native_call(self) -> int:
        """vmap makes one native call of its calls; a scan makes one per layer."""
        return self.bytes_moved // (self.calls if self.form == "layers" else 1)


CASES = {
    "documented": Case(320, 1, 8, 1, 128, "contiguous", 320, 1280),
    "llama3-8b-b1": Case(1, 1, 32, 8, 128, "page", 128, 16),
    "llama3-8b-b32": Case(32, 1, 32, 8, 128, "page", 1024, 16),
    "llama3-8b-b256": Case(256, 1, 32, 8, 128, "page", 4096, 16),
    "qwen2.5-7b-b1": Case(1, 1, 28, 4, 128, "page", 128, 16),
    "qwen2.5-7b-b32": Case(32, 1, 28, 4, 128, "page", 1024, 16),
    "qwen2.5-7b-b256": Case(256, 1, 28, 4, 128, "page", 4096, 16),
    "llama3-70b-tp8-b64": Case(64, 1, 8, 1, 128, "page", 4096, 16),
    "llama3-8b-prefill-1024": Case(1, 1024, 32, 8, 128, "page", 128, 16),
    "llama3-8b-prefill-8192": Case(1, 8192, 32, 8, 128, "page", 1024, 16),
    "llama3-8b-b32-vmap4": Case(32, 1, 32, 8, 128, "page", 1024, 16, "vmap", 4),
    "llama3-8b-b32-layers8": Case(32, 1, 32, 8, 128, "contiguous", 32, 512, "layers", 8),
}


PER_TOKEN = ("x", "cos", "sin", "indices", "activation_scale")  # what vmap maps


def make_inputs(case: Case, seed: int) -> dict[str, jax.Array]:
    """Everything but the caches."""
    if case.form == "vmap":
        one = case._replace(form="call", calls=1)
        calls = [make_inputs(one, seed * case.calls + i) for i in range(case.calls)]
        return calls[0] | {name: jnp.stack([c[name] for c in calls]) for name in PER_TOKEN}
    rng = np.random.default_rng(seed)
    tokens, heads = (case.B, case.S), (case.Nkv, case.D)

    def uniform(shape, low, high):
        return np.asarray(rng.uniform(low, high, shape), np.float32)

    if case.cache_mode == "page":
        indices = rng.choice(case.C1 * case.C2, case.B * case.S, replace=False)
        if case.S > 1:
            indices.sort()
    else:
        indices = rng.integers(0, case.C2 - case.S + 1, case.B)
    inputs = {
        "x": rng.integers(-40000, 40000, (*tokens, case.H), np.int32),
        "cos": uniform((*tokens, 1, case.D), -1, 1).astype(jnp.bfloat16),
        "sin": uniform((*tokens, 1, case.D), -1, 1).astype(jnp.bfloat16),
        "indices": indices.astype(np.int32),
        "scale_k": uniform(heads, 0.01, 0.1),
        "scale_v": uniform(heads, 0.01, 0.1),
        "offset_k": uniform(heads, -5, 5),
        "offset_v": uniform(heads, -5, 5),
        "weight_scale": uniform(case.H, 1e-5, 1e-4),
        "activation_scale": uniform(tokens, 0.5, 2),
        "bias": uniform(case.H, -1, 1),
    }
    return jax.device_put(inputs)


def make_caches(case: Case) -> tuple[jax.Array, jax.Array]:
    """k_cache and v_cache."""
    calls = () if case.form == "call" else (case.calls,)
    shape = (*calls, case.C1, case.C2, case.Nkv, case.D)
    return jnp.zeros(shape, jnp.int8), jnp.ones(shape, jnp.int8)
