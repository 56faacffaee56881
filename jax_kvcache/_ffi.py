"""Finds and loads the native library, registers its FFI targets, and says what is missing."""

import ctypes
from pathlib import Path

from jax_kvcache import _ascend

TARGET = "dequant_rope_quant_kvcache"  # the same name on every platform
NATIVE_PLATFORMS: tuple[str, ...] = _ascend.PLATFORMS


def _load():
    library = ctypes.CDLL(str(Path(__file__).parent / "libjax_kvcache.so"))
    _ascend.register(library, TARGET)
    return library


_library = _load()


def unavailable(platform: str) -> str | None:
    """Why the native target cannot run on `platform`, or None when it can."""
    if platform in _ascend.PLATFORMS:
        return _ascend.unavailable()
    return f"there is no native target for platform '{platform}'"


def refusal(platform: str, operands) -> str | None:
    """Why the native target cannot take this call on `platform`, or None when it can.

    Args:
      platform: the platform that is lowered, for example "cpu".
      operands: the primitive's operands, or their types.
    """
    if platform in _ascend.PLATFORMS and (reason := _ascend.refusal(operands)):
        return reason
    return unavailable(platform)
