"""Finds and loads the native library, and says what is missing."""

import ctypes
import functools
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax

NAME = "libjax_kvcache.so"
BENCH_NAME = "libjax_kvcache_bench.so"  # what the benchmark compares with, beside it
_SYMBOLS = (  # that the library has in every build; those of CUDA are only in some
    "decode_attention_cpu",
    "dequant_rope_quant_kvcache_cpu",
    "dequant_rope_quant_kvcache_ascend",
    "jax_kvcache_cann",
    "jax_kvcache_ffi_api_version",
    "jax_kvcache_simd",
    "jax_kvcache_threads",
)


class Library(NamedTuple):
    """The loaded library, or None and why it cannot be used."""

    handle: ctypes.CDLL | None
    missing: str | None


def path(name: str = NAME) -> Path:
    """A library beside the package, or else that of the installed distribution.

    The two differ when Python starts in a source checkout, which hides the installed package.
    """
    package = Path(__file__).parent.parent
    beside = package / name
    if beside.exists():
        return beside
    try:
        installed = metadata.distribution("jax-kvcache").locate_file(f"{package.name}/{name}")
    except metadata.PackageNotFoundError:
        return beside
    return Path(str(installed)) if Path(str(installed)).exists() else beside


def _runtime_ffi_version() -> int | None:
    """The FFI version of the installed jaxlib, 1000 * major + minor, as its own headers say it."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    if not header.exists():
        return None
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header.read_text()))
    return 1000 * int(found["MAJOR"]) + int(found["MINOR"])


def _version_conflict(library: ctypes.CDLL) -> str | None:
    """Why this jaxlib must not be given the library's handlers, or None when it may.

    A handler built with newer FFI headers keeps the whole CPU backend from starting.
    """
    built, running = library.jax_kvcache_ffi_api_version(), _runtime_ffi_version()
    if running is None:
        return "the installed jaxlib has no FFI headers, which say its FFI version"
    if built > running or built // 1000 != running // 1000:
        return (
            f"the native library was built for XLA FFI {built // 1000}.{built % 1000} and the "
            f"installed jaxlib has {running // 1000}.{running % 1000}"
        )
    return None


@functools.cache
def load() -> Library:
    """Loads the native library, once."""
    try:
        handle = ctypes.CDLL(str(path()))
    except OSError as error:
        return Library(None, f"the native library cannot be loaded ({error})")
    if lacking := [symbol for symbol in _SYMBOLS if not hasattr(handle, symbol)]:
        return Library(
            None, f"the native library {path()} is of another version: it has no '{lacking[0]}'"
        )
    handle.jax_kvcache_simd.restype = ctypes.c_char_p
    handle.jax_kvcache_threads.restype = ctypes.c_int64
    handle.jax_kvcache_threads.argtypes = [ctypes.c_int64, ctypes.c_int64]
    handle.jax_kvcache_cann.argtypes = [ctypes.POINTER(ctypes.c_char_p)]
    conflict = _version_conflict(handle)
    return Library(None, conflict) if conflict else Library(handle, None)


def missing() -> str | None:
    """Why there is no native library, or None when there is one."""
    return load().missing


def symbol(name: str) -> Any:
    """A function of the loaded library."""
    return getattr(load().handle, name)


def simd() -> str | None:
    """The CPU kernels' instruction set, "baseline" to "avx512_bf16"; None without the library."""
    return None if missing() else symbol("jax_kvcache_simd")().decode()


def worth_threads(nbytes: int) -> int:
    """How many of this process's CPUs the kernel uses for a call that moves that many bytes."""
    if missing():
        return 1
    return symbol("jax_kvcache_threads")(nbytes, len(os.sched_getaffinity(0)))
