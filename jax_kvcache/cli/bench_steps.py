"""What the benchmark runs on a shape: one step per contestant."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_kvcache.backends import library
from jax_kvcache.caches import KVCache
from jax_kvcache.cli.bench_cases import PER_TOKEN, Case
from jax_kvcache.ops.dequant_rope_quant_kvcache.api import (
    canonical_operands,
    dequant_rope_quant_kvcache,
)
from jax_kvcache.ops.dequant_rope_quant_kvcache.checks import Call
from jax_kvcache.ops.dequant_rope_quant_kvcache.reference import Operands, Results
from jax_kvcache.ops.operands import aliases, flattened

EMPTY = "dequant_rope_quant_kvcache_empty"
MEMCPY = "jax_kvcache_memcpy"
READ = "jax_kvcache_read"


def register_comparisons() -> None:
    """Registers the custom calls that the operator is compared with, from their own library."""
    handlers = ctypes.CDLL(str(library.path(library.BENCH_NAME)))
    for name in (EMPTY, MEMCPY, READ):
        handler = jax.ffi.pycapsule(getattr(handlers, name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")


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


def vmapped(caches, inputs, **options):
    """Several calls, each on caches of its own, as one."""
    in_axes = {name: 0 if name in PER_TOKEN else None for name in inputs}

    def one(caches, inputs):
        return operator(caches, inputs, **options)

    return jax.vmap(one, in_axes=(0, in_axes))(caches, inputs)


def layered(caches, inputs, *, cache_mode, implementation):
    """A scan over the layers of one KVCache, with the same inputs for each."""
    del cache_mode  # "contiguous"
    layers = caches[0].shape[0]
    names = ("scale_k", "scale_v", "offset_k", "offset_v")
    parameters: Any = {name: jnp.stack([inputs[name]] * layers) for name in names}
    cache = KVCache(k_cache=caches[0], v_cache=caches[1], **parameters, layers=layers)
    arguments = {name: value for name, value in inputs.items() if name not in names}
    positions = arguments.pop("indices")

    def body(carry, layer):
        cache, _ = carry
        q, cache = cache.update(
            **arguments, positions=positions, layer=layer, implementation=implementation
        )
        return (cache, q), None

    (B, S, H), (*_, Nkv, D) = inputs["x"].shape, caches[0].shape
    q = jnp.zeros((B, S, H // D - 2 * Nkv, D), inputs["cos"].dtype)
    (cache, q), _ = jax.lax.scan(body, (cache, q), jnp.arange(layers))
    return q, (cache.k_cache, cache.v_cache)


def bare_call(target, caches, inputs, *, cache_mode, copied=(), **attributes):
    """A custom call with the operator's operands, results and aliasing that does something else.

    `copied`: nothing, or a source and a destination that become the first operands; the result is
    then the destination as well.
    """
    call = Call(
        **inputs, k_cache=caches[0], v_cache=caches[1], kv_output=True, cache_mode=cache_mode
    )
    operands = flattened(canonical_operands(call)[0])
    B, S, H = call.x.shape
    *_, Nkv, D = caches[0].shape
    heads = (H // D - 2 * Nkv, Nkv, Nkv)
    flat = [jax.ShapeDtypeStruct((B * S * n * D,), call.cos.dtype) for n in heads]
    results = [*flat, *caches]
    in_place = aliases(Operands, Results)
    if copied:
        results = [copied[1], *results]
        in_place = {1: 0} | {operand + 2: result + 1 for operand, result in in_place.items()}
    results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in results]
    function = jax.ffi.ffi_call(target, results, input_output_aliases=in_place)
    *copies, q, k, v, k_cache, v_cache = function(*copied, *operands, **attributes)
    outputs = [a.reshape(B, S, n, D) for a, n in zip((q, k, v), heads, strict=True)]
    return outputs, (k_cache, v_cache), *copies


def empty(caches, inputs, *, cache_mode):
    """A call that does nothing."""
    return bare_call(EMPTY, caches, inputs, cache_mode=cache_mode, kv_output=True)


def memcpy(state, inputs, *, cache_mode, threads):
    """A call that copies an array over another, which is donated, on XLA's threads."""
    caches, destination = state
    inputs, source = inputs
    outputs, caches, destination = bare_call(
        MEMCPY, caches, inputs, cache_mode=cache_mode, copied=(source, destination), threads=threads
    )
    return outputs, (caches, destination)


def _jit(function: Callable, case: Case, **options) -> Callable:
    return jax.jit(
        functools.partial(function, cache_mode=case.cache_mode, **options), donate_argnums=0
    )


def steps(case: Case) -> dict[str, Callable]:
    """The contestants that take (caches, inputs), jitted with the caches donated."""
    ours = {"call": operator, "vmap": vmapped, "layers": layered}[case.form]
    others = {"obvious": obvious, "empty": empty} if case.form == "call" else {}
    return {
        **{name: _jit(ours, case, implementation=name) for name in ("ffi", "xla")},
        **{name: _jit(function, case) for name, function in others.items()},
    }


def memcpy_step(case: Case, threads: int) -> Callable:
    """The contestant that takes ((caches, destination), (inputs, source))."""
    return _jit(memcpy, case, threads=threads)
