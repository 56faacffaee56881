"""The CUDA backend: what its kernels take, and the scratch they get.

The kernels are in the native library where it was built with an nvcc. `ffi/CUDA.md` says what has
run on a GPU and how to show it.
"""

import ctypes
import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_kvcache import _compat
from jax_kvcache.backends import library
from jax_kvcache.backends.backend import Backend, Target, register_with_jax
from jax_kvcache.ops.operands import group_rank_of

SHOWN_ON = "NVIDIA H100 80GB HBM3, NVIDIA H200"
"""The cards on which `pytest -m cuda_device` passed."""

NO_GPU = "this process has no NVIDIA GPU"

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
"""The attention kernel is compiled for these."""

MAX_QUERIES = 16
"""Of a sequence: each 16 query rows of a kv head read the cache once more."""

_OLDEST_CAPABILITY = 8.0  # that has the matrix products of attention
_TILE = 16  # query rows (queries times query heads of one kv head) that a block of threads has
_BLOCKS = 4096  # several for each that the largest card has at a time
_FEWEST_ROWS = 128  # that are worth a block
_MOST_SPLITS = 128
_SYMBOLIC_SPLITS = 16
_EXTRAS = 4  # numbers that a partial result has beside its D sums


def _has(symbol: str) -> bool:
    return library.missing() is None and hasattr(library.load().handle, symbol)


def register(backend: Backend) -> None:
    """Registers the targets, if the library was built with them."""
    if all(_has(target.symbol) for target in backend.targets.values()):
        register_with_jax(backend)


def _not_built() -> str | None:
    """Why the library has no CUDA kernels, or None when it has."""
    if (missing := library.missing()) is not None:
        return missing
    if all(_has(target.symbol) for target in CUDA.targets.values()):
        return None
    return "the native library was built without CUDA, because no nvcc was found"


def is_here() -> bool:
    """Whether JAX has started on an NVIDIA GPU in this process."""
    backends = _compat.initialized_backends()
    return "cuda" in backends or "cuda" in backends.values()


def _versions() -> tuple[int, int]:
    """The CUDA versions that the driver knows and that the library was built with.

    Each is 1000 * major + 10 * minor; the driver's is 0 where there is none.
    """
    driver, built = ctypes.c_int(), ctypes.c_int()
    library.symbol("jax_kvcache_cuda_versions")(ctypes.byref(driver), ctypes.byref(built))
    return driver.value, built.value


def _old_driver() -> str | None:
    """Why the GPU's driver cannot run the kernels, or None: it must know their major version."""
    driver, built = (divmod(version // 10, 100) for version in _versions())
    if driver[0] >= built[0]:
        return None
    return (
        f"the kernels were built with CUDA {built[0]}.{built[1]}, and the GPU's driver knows "
        f"CUDA {driver[0]}.{driver[1]}: install a newer driver, or build with CUDA {driver[0]}"
    )


def unavailable() -> str | None:
    """Why the kernels cannot run in this process, or None when they can."""
    if (reason := _not_built()) is not None:
        return reason
    if not is_here():
        return NO_GPU
    if (reason := _old_driver()) is not None:
        return reason
    for device in jax.local_devices(backend="cuda"):
        if float(device.compute_capability) < _OLDEST_CAPABILITY:
            return (
                f"the kernels need compute capability {_OLDEST_CAPABILITY} or newer, and "
                f"{device.device_kind} has {device.compute_capability}"
            )
    return None


def report() -> dict[str, str]:
    """What was built and what has been shown, for people."""
    return {"kernels": _not_built() or "built", "tests passed on": SHOWN_ON}


def attention_prefers_reference(operands: Any) -> str | None:
    """Why XLA is to run a call of attention, or None: a prefill does more than read the cache."""
    queries = operands.q.shape[-3]
    if isinstance(queries, int) and queries > MAX_QUERIES:
        return f"S = {queries} queries per sequence are a prefill, more than {MAX_QUERIES}"
    return None


def attention_refusal(operands: Any) -> str | None:
    """Why the attention kernel does not take these operands (or their types), or None."""
    queries, _, head_dim = operands.q.shape[-3:]
    if head_dim not in HEAD_DIMS:
        known = ", ".join(map(str, HEAD_DIMS))
        return f"the CUDA kernel takes D = {known}, got D = {head_dim}"
    if isinstance(queries, int) and queries > MAX_QUERIES:
        return f"the CUDA kernel takes S <= {MAX_QUERIES} queries per sequence, got S = {queries}"
    rows = operands.k_cache.shape[group_rank_of(operands) : -2]
    if all(isinstance(dim, int) for dim in rows) and math.prod(rows) >= 2**32 - 1:
        return f"the CUDA kernel numbers rows in 32 bits, got {math.prod(rows)} rows"
    return None


def attention_splits(operands: Any) -> int:
    """Over how many blocks of threads the rows of each sequence may be spread, from shapes alone.

    There is scratch for so many; the kernels choose, from the card, how many they use.
    """
    kv_heads = operands.k_cache.shape[-2]
    queries, q_heads = operands.q.shape[-3:-1]
    sizes = (*operands.table.shape, operands.k_cache.shape[-3], kv_heads, queries, q_heads)
    if not all(isinstance(size, int) for size in sizes):
        return _SYMBOLIC_SPLITS
    tiles = -(-queries * (q_heads // kv_heads) // _TILE)
    blocks = max(math.prod(operands.table.shape[:-1]) * kv_heads * tiles, 1)
    capacity = operands.table.shape[-1] * operands.k_cache.shape[-3]
    wanted = -(-_BLOCKS // blocks)
    return max(min(wanted, -(-capacity // _FEWEST_ROWS), _MOST_SPLITS), 1)


def attention_scratch(operands: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The partial results: rows of q * splits * (D + 4) float32; [0] where nothing is split."""
    splits = attention_splits(operands)
    *rows, head_dim = operands.q.shape
    size = splits * math.prod(rows) * (head_dim + _EXTRAS) if splits > 1 else 0
    return (jax.ShapeDtypeStruct((size,), jnp.float32),)


CUDA = Backend(
    name="cuda",
    lowered_as=("cuda",),
    registered_as=("CUDA",),
    reported_as=("gpu", "cuda"),
    targets={
        "dequant_rope_quant_kvcache": Target("dequant_rope_quant_kvcache_cuda"),
        "decode_attention": Target(
            "decode_attention_cuda",
            refusal=attention_refusal,
            prefers_reference=attention_prefers_reference,
            scratch=attention_scratch,
        ),
    },
    unavailable=unavailable,
    is_here=is_here,
    lowers_elsewhere=True,
    register=register,
    report=report,
)
