"""What the benchmark runs: the shapes, their inputs, and one step per contestant."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvcache import _ffi, dequant_rope_quant_kvcache
from jax_kvcache._checks import Call
from jax_kvcache._op import canonical_operands
from jax_kvcache._primitive import native_operands

EMPTY = f"{_ffi.TARGET}_empty"
MEMCPY = "jax_kvcache_memcpy"


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

    @property
    def H(self) -> int:
        """Width of x: (Nq + 2*Nkv) * D."""
        return (self.Nq + 2 * self.Nkv) * self.D

    @property
    def bytes_moved(self) -> int:
        """Bytes that one call must read and write."""
        tokens, kv = self.B * self.S, self.Nkv * self.D
        read = tokens * (4 * self.H + 2 * 2 * self.D + 4 + 4) + 4 * (2 * self.H + 4 * kv)
        written = tokens * (2 * self.H + 2 * kv)
        return read + written


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
}


def make_inputs(case: Case, seed: int) -> dict[str, jax.Array]:
    """Everything but the caches."""
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
    shape = (case.C1, case.C2, case.Nkv, case.D)
    return jnp.zeros(shape, jnp.int8), jnp.ones(shape, jnp.int8)


def obvious(caches, inputs, *, cache_mode):
    """What a user would write in jax.numpy: the same values but for rounding, and cache copies.

    It writes rows of the flattened cache, and the reshape is what copies it. Without that the code
    is what `xla` measures.
    """
    k_cache, v_cache = caches
    C1, C2, Nkv, D = k_cache.shape
    B, S, H = inputs["x"].shape
    y = inputs["x"].astype(jnp.float32) * inputs["weight_scale"]
    y = y * inputs["activation_scale"][..., None] + inputs["bias"]
    y = y.reshape(B, S, H // D, D)
    q, k, v = jnp.split(y, [H // D - 2 * Nkv, H // D - Nkv], axis=2)

    def rotate(head):
        low, high = jnp.split(head, 2, axis=-1)
        turned = jnp.concatenate([-high, low], axis=-1)
        return head * inputs["cos"].astype(jnp.float32) + turned * inputs["sin"].astype(jnp.float32)

    def quantize(value, scale, offset):
        return jnp.clip(jnp.round(value / scale + offset), -128, 127).astype(jnp.int8)

    q, k = rotate(q), rotate(k)
    rows = inputs["indices"]
    if cache_mode == "contiguous":
        rows = (jnp.arange(B)[:, None] * C2 + rows[:, None] + jnp.arange(S)).reshape(-1)
    new_caches = tuple(
        cache.reshape(C1 * C2, Nkv, D)
        .at[rows]
        .set(codes.reshape(B * S, Nkv, D))
        .reshape(cache.shape)
        for cache, codes in (
            (k_cache, quantize(k, inputs["scale_k"], inputs["offset_k"])),
            (v_cache, quantize(v, inputs["scale_v"], inputs["offset_v"])),
        )
    )
    return [out.astype(jnp.bfloat16) for out in (q, k, v)], new_caches


def operator(caches, inputs, *, cache_mode, implementation):
    """The operator, as a step of (outputs, caches)."""
    *outputs, k_cache, v_cache = dequant_rope_quant_kvcache(
        **inputs, k_cache=caches[0], v_cache=caches[1], kv_output=True, cache_mode=cache_mode,
        implementation=implementation,
    )  # fmt: skip
    return outputs, (k_cache, v_cache)


def empty(caches, inputs, *, cache_mode):
    """A custom call that does nothing, with the operator's operands, results and aliasing."""
    call = Call(
        **inputs, k_cache=caches[0], v_cache=caches[1], kv_output=True, cache_mode=cache_mode
    )
    operands, _ = canonical_operands(call)
    B, S, _ = call.x.shape
    *_, Nkv, D = caches[0].shape
    heads = (call.x.shape[-1] // D - 2 * Nkv, Nkv, Nkv)
    flat = [jax.ShapeDtypeStruct((B * S * n * D,), call.cos.dtype) for n in heads]
    results = [*flat, *(jax.ShapeDtypeStruct(c.shape, c.dtype) for c in caches)]
    target = jax.ffi.ffi_call(EMPTY, results, input_output_aliases={3: 3, 4: 4})
    *outputs, k_cache, v_cache = target(*native_operands(operands), kv_output=True)
    outputs = [a.reshape(B, S, n, D) for a, n in zip(outputs, heads, strict=True)]
    return outputs, (k_cache, v_cache)


def memcpy(target, source, *, threads):
    """Copies `source` over `target`, which is donated, on XLA's threads."""
    result = jax.ShapeDtypeStruct(target.shape, target.dtype)
    call = jax.ffi.ffi_call(MEMCPY, result, input_output_aliases={1: 0})
    return (), call(source, target, threads=threads)


def steps(case: Case) -> dict[str, Callable]:
    """The contestants that take (caches, inputs), jitted with the caches donated."""
    contestants: dict[str, Callable] = {
        "ffi": functools.partial(operator, implementation="ffi"),
        "xla": functools.partial(operator, implementation="xla"),
        "obvious": obvious,
        "empty": empty,
    }
    return {
        name: jax.jit(functools.partial(f, cache_mode=case.cache_mode), donate_argnums=0)
        for name, f in contestants.items()
    }
