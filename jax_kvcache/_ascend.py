"""The Ascend platform: registering with its plugin, what the operator takes, what it is given."""

import ctypes
import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_kvcache import _compat, _pjrt

PLATFORMS = ("ascend", "ASCEND")
"""The public plugin registers as the first, and its client reports the second: each keys rules."""

INT32_MAX = 2**31 - 1
MAX_WIDTH = 4096
"""Of H, documented. So Nkv*D stays below 2048, where the published kernel's stride overflows."""

_library: ctypes.CDLL | None = None
_through_jax: str | None = "it was not tried"  # why not, or None
_through_pjrt: str | None = "no Ascend PJRT plugin was found in this process"


# Registration


def register(library: ctypes.CDLL, target: str) -> None:
    """Registers the handler with the Ascend plugin, now or when JAX discovers it.

    Args:
      library: the native library.
      target: the FFI target's name.
    """
    global _library, _through_jax
    _library = library
    library.jax_kvcache_cann.argtypes = [ctypes.POINTER(ctypes.c_char_p)]
    capsule = jax.ffi.pycapsule(library.dequant_rope_quant_kvcache_ascend)
    try:
        for platform in PLATFORMS:
            jax.ffi.register_ffi_target(target, capsule, platform=platform)
        _through_jax = None
    except Exception as error:  # whatever the plugin's hook raises
        _through_jax = f"the plugin's hook raised {type(error).__name__}: {error}"

    def with_plugin(c_api):
        global _through_pjrt
        handler = _pjrt.capsule_pointer(capsule)
        if any(c_api is _compat.plugin_api(name) for name in PLATFORMS):
            errors = [_pjrt.register_handler(c_api, target, handler, p) for p in PLATFORMS]
            _through_pjrt = None if None in errors else errors[0]

    _compat.on_plugins_discovered(with_plugin)


def routes() -> dict[str, str | None]:
    """The ways to register with the plugin: for each None where it worked, or why it did not."""
    hooked = any(map(_compat.has_custom_call_handler, PLATFORMS))
    through_jax = _through_jax or (None if hooked else "no plugin takes targets from jax.ffi")
    return {"jax.ffi": through_jax, "PJRT FFI extension": _through_pjrt}


def cann() -> tuple[bool, str]:
    """Whether CANN's libraries are bound, and their files or every place looked at."""
    if _library is None:
        return False, "the native library is not loaded"
    text = ctypes.c_char_p()
    bound = _library.jax_kvcache_cann(ctypes.byref(text))
    return bool(bound), (text.value or b"").decode(errors="replace")


def plugin() -> str | None:
    """The platform name of this process's Ascend plugin; None without one, or before JAX starts."""
    return next((p for p in _compat.initialized_backends().values() if p in PLATFORMS), None)


def unavailable() -> str | None:
    """Why the operator cannot run in this process, or None when it can."""
    if plugin() is None:
        return "this process has no Ascend PJRT plugin"
    reasons = routes()
    if None not in reasons.values():
        tried = "; ".join(f"{route}: {reason}" for route, reason in reasons.items())
        return f"the Ascend plugin did not take the FFI target ({tried})"
    bound, text = cann()
    return None if bound else text


def report() -> dict[str, str]:
    """The state of everything that the operator needs, for people."""
    registered = {f"target through {k}": v or "registered" for k, v in routes().items()}
    return {"plugin": plugin() or "none in this process"} | registered | {"CANN": cann()[1]}


# What the operator takes


def _shape_refusal(num_q_heads: int, num_kv_heads: int, head_dim: int, half: bool) -> str | None:
    """Why the operator does not take a width; `half` is whether the tables are float16."""
    width = (num_q_heads + 2 * num_kv_heads) * head_dim
    kv_width = num_kv_heads * head_dim
    if width > MAX_WIDTH:
        return f"the operator takes H <= {MAX_WIDTH}, got H = {width}"
    if width % 64:
        return f"the operator takes H in multiples of 64, got H = {width}"
    if head_dim % 16:
        return f"the operator takes D in multiples of 16, got D = {head_dim}"
    if half and head_dim % 32:
        return f"the published kernel is misaligned for float16 with D % 32, got D = {head_dim}"
    if kv_width % 64:
        return f"the published kernel quantises Nkv*D in multiples of 64 only, got {kv_width}"
    return None


def _tensor_parallel_degree(num_q_heads, num_kv_heads, head_dim, half) -> int | None:
    """The smallest number of devices, each with an equal part of the heads, whose part is taken."""
    for degree in range(2, num_kv_heads + 1):
        if num_q_heads % degree or num_kv_heads % degree:
            continue
        if not _shape_refusal(num_q_heads // degree, num_kv_heads // degree, head_dim, half):
            return degree
    return None


def refusal(operands: Any) -> str | None:
    """Why the operator is not called for these operands, or None.

    Args:
      operands: the primitive's operands, or their types.
    """
    num_kv_heads, head_dim = operands.k_cache.shape[-2:]
    width = operands.x.shape[-1]
    num_q_heads = width // head_dim - 2 * num_kv_heads
    groups = operands.slots.shape[:-1]
    if operands.cos.dtype == jnp.float32:
        return "the operator takes float16 and bfloat16 tables, got float32"
    for name in ("scale_k", "scale_v", "offset_k", "offset_v", "weight_scale", "bias"):
        shape = getattr(operands, name).shape
        if shape != (0,) and any(dim != 1 for dim in shape[: len(groups)]):
            return f"the operator takes one `{name}`, got one for each group: {shape}"
    rows = operands.k_cache.shape[:-2]
    if all(isinstance(dim, int) for dim in rows) and math.prod(rows) > INT32_MAX:
        return f"the operator's slots are int32, got {math.prod(rows)} rows in all groups"
    heads = (num_q_heads, num_kv_heads, head_dim, operands.cos.dtype == jnp.float16)
    reason = _shape_refusal(*heads)
    if reason is None:
        return None
    degree = _tensor_parallel_degree(*heads)
    if degree is None:
        return reason
    return f"{reason}; tensor parallelism over {degree} devices fits (H = {width // degree})"


# The operator's operands


def flat_slots(slots, rows: int):
    """Slots over all groups, safe to follow: the operator checks no upper bound.

    Args:
      slots: [*g, T] int32, row in [0, C) of its group; anything else skips the token.
      rows: C.

    Returns:
      [*g, T] int32: group * C + slot, or -1.
    """
    groups, capacity = slots.shape[:-1], jnp.asarray(rows, jnp.int32)
    group = jnp.arange(math.prod(groups), dtype=jnp.int32).reshape(*groups, 1)
    inside = (slots >= 0) & (slots < capacity)
    # Symbolic sizes were not checked: a group whose rows int32 cannot count is not written.
    inside = inside & (group < INT32_MAX // capacity)
    base = group * capacity
    return jnp.where(inside, slots + base, jnp.full_like(slots, -1))


def native_operands(operands):
    """The primitive's operands as the operator gets them; caches are passed on as they are."""
    groups = len(operands.slots.shape) - 1
    rows = math.prod(operands.k_cache.shape[groups:-2])
    return operands._replace(slots=flat_slots(operands.slots, rows))
