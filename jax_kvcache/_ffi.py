"""Finds and loads the native library, registers its FFI targets, and says what is missing."""

TARGET = "dequant_rope_quant_kvcache"  # the same name on every platform
NATIVE_PLATFORMS: tuple[str, ...] = ()


def unavailable(platform: str) -> str | None:
    """Why the native target cannot run on `platform`, or None when it can."""
    return f"there is no native target for platform '{platform}'"


def refusal(platform: str, operands) -> str | None:
    """Why the native target cannot take this call on `platform`, or None when it can.

    Args:
      platform: the platform that is lowered, for example "cpu".
      operands: the primitive's operands, or their types.
    """
    return unavailable(platform)
