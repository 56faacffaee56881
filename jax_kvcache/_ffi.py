"""Finds and loads the native library, registers its FFI targets, and says what is missing."""

import ctypes
import os
import re
from importlib import metadata
from pathlib import Path

import jax

from jax_kvcache import _ascend, _compat

TARGET = "dequant_rope_quant_kvcache"  # the same name on every platform
NATIVE_PLATFORMS: tuple[str, ...] = ("cpu", *_ascend.PLATFORMS)
LIBRARY_NAME = "libjax_kvcache.so"


def library_path() -> Path:
    """The library beside this file, or else that of the installed distribution.

    The two differ when Python starts in a source checkout, which hides the installed package.
    """
    beside = Path(__file__).parent / LIBRARY_NAME
    if beside.exists():
        return beside
    try:
        installed = metadata.distribution("jax-kvcache").locate_file(f"jax_kvcache/{LIBRARY_NAME}")
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


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The native library, or None and the reason."""
    try:
        library = ctypes.CDLL(str(library_path()))
    except OSError as error:
        return None, f"the native library cannot be loaded ({error})"
    library.jax_kvcache_simd.restype = ctypes.c_char_p
    library.jax_kvcache_threads.restype = ctypes.c_int64
    library.jax_kvcache_threads.argtypes = [ctypes.c_int64, ctypes.c_int64]
    conflict = _version_conflict(library)
    return (None, conflict) if conflict else (library, None)


_library, _missing = _load()


def register(name: str, symbol: str, platform: str) -> None:
    """Registers one of the library's handlers as an FFI target."""
    handler = jax.ffi.pycapsule(getattr(_library, symbol))
    jax.ffi.register_ffi_target(name, handler, platform=platform)


if _library is not None:
    register(TARGET, f"{TARGET}_cpu", "cpu")
    _ascend.register(_library, TARGET)
_compat.enable_donation(_ascend.PLATFORMS)  # exporting for Ascend needs no library


def simd() -> str | None:
    """The kernel's instruction set, "baseline" to "avx512_bf16"; None without the library."""
    return _library.jax_kvcache_simd().decode() if _library else None


def worth_threads(nbytes: int) -> int:
    """How many of this process's CPUs the kernel uses for a call that moves that many bytes."""
    return _library.jax_kvcache_threads(nbytes, len(os.sched_getaffinity(0))) if _library else 1


def unavailable(platform: str) -> str | None:
    """Why the native target cannot run on `platform`, or None when it can."""
    if platform not in NATIVE_PLATFORMS:
        return f"there is no native target for platform '{platform}'"
    if _missing is None and platform in _ascend.PLATFORMS:
        return _ascend.unavailable()
    return _missing


def refusal(platform: str, operands) -> str | None:
    """Why the native target cannot take this call on `platform`, or None when it can.

    Args:
      platform: the platform that is lowered, for example "cpu".
      operands: the primitive's operands, or their types.
    """
    if platform not in _ascend.PLATFORMS:
        return unavailable(platform)
    if (reason := _ascend.refusal(operands)) or _ascend.plugin() is None:
        return reason  # without an Ascend device here, the call is lowered for another machine
    return unavailable(platform)
