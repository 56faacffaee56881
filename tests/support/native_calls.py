"""Direct calls of the native CPU target, without the operator's Python checks."""

import ctypes
import math
import os

import jax
import numpy as np
from support.internals import (
    Call,
    Operands,
    Results,
    canonical_operands,
    library,
    primitive,
)
from support.internals import (
    operands as tables,
)

LIBRARY = ctypes.CDLL(str(library.path()))
LIBRARY.jax_kvcache_use_simd.restype = ctypes.c_bool
SIMD = [
    name
    for name in ("baseline", "avx2", "avx512", "avx512_bf16")
    if LIBRARY.jax_kvcache_use_simd(name.encode())  # leaves the last one, the best, in use
]
THREADS = len(os.sched_getaffinity(0))


def results_of(operands: Operands, kv_output: bool) -> list[jax.ShapeDtypeStruct]:
    *tokens, H = operands.x.shape
    *_, Nkv, D = operands.k_cache.shape
    kv = math.prod(tokens) * Nkv * D
    sizes = [math.prod(tokens) * H - 2 * kv, *[kv if kv_output else 0] * 2]
    outputs = [jax.ShapeDtypeStruct((size,), operands.cos.dtype) for size in sizes]
    caches = (operands.k_cache, operands.v_cache)
    return [*outputs, *(jax.ShapeDtypeStruct(c.shape, c.dtype) for c in caches)]


def call(operands, results, *, aliases=None, **attributes):
    aliases = tables.aliases(Operands, Results) if aliases is None else aliases
    target = jax.ffi.ffi_call(primitive.NAME, results, input_output_aliases=aliases)
    return jax.jit(lambda *args: target(*args, **attributes))(*operands)


def canonical(inputs: dict, **options) -> Operands:
    """The operands as the native target takes them."""
    return tables.flattened(canonical_operands(Call(**inputs, **options))[0])


def in_order(operands: Operands) -> list[np.ndarray]:
    return [np.asarray(operand) for operand in operands]
