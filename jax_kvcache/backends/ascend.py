"""The Ascend backend: what its operator needs, what it takes, what it is given."""

import ctypes
import math
from typing import Any

import jax.numpy as jnp

from jax_kvcache import _compat
from jax_kvcache.backends import ascend_plugin, library
from jax_kvcache.backends.ascend_plugin import PLATFORMS
from jax_kvcache.backends.backend import Backend, Target
from jax_kvcache.ops.operands import group_rank_of, is_absent, table
from jax_kvcache.ops.slots import INT32_MAX, group_slots

MAX_WIDTH = 4096
"""Of H, documented. So Nkv*D stays below 2048, where the published kernel's stride overflows."""


# What it needs


def cann() -> tuple[bool, str]:
    """Whether CANN's libraries are bound, and their files or every place looked at."""
    if library.missing() is not None:
        return False, "the native library is not loaded"
    text = ctypes.c_char_p()
    bound = library.symbol("jax_kvcache_cann")(ctypes.byref(text))
    return bool(bound), (text.value or b"").decode(errors="replace")


def unavailable() -> str | None:
    """Why the operator cannot run in this process, or None when it can."""
    if (missing := library.missing()) is not None:
        return missing
    if ascend_plugin.name() is None:
        return "this process has no Ascend PJRT plugin"
    if (reason := ascend_plugin.refusal()) is not None:
        return reason
    bound, text = cann()
    return None if bound else text


def report() -> dict[str, str]:
    """The state of everything that the operator needs, for people."""
    name = ascend_plugin.name()
    offers = {f"offered through {k}": v or "accepted" for k, v in ascend_plugin.offers().items()}
    if name is None:
        target = "not registered: there is no plugin"
    elif (reason := ascend_plugin.refusal()) is not None:
        target = f"not registered: {reason}"
    else:
        target = "registered: a program with it compiles"
    plugin = {"plugin": name or "none in this process"}
    return plugin | offers | {"target": target, "CANN": cann()[1]}


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
    for name, row in table(type(operands)).items():
        value = getattr(operands, name)
        shared = row.dims.startswith("*g'") and not is_absent(value)
        if shared and any(dim != 1 for dim in value.shape[: len(groups)]):
            return f"the operator takes one `{name}`, got one for each group: {value.shape}"
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


def prepare(operands: Any) -> Any:
    """The primitive's operands as the operator gets them; caches are passed on as they are.

    The operator checks no upper bound: its slots, over the rows of all groups, are made safe here.
    """
    rows = math.prod(operands.k_cache.shape[group_rank_of(operands) : -2])
    return operands._replace(slots=group_slots(operands.slots, rows))


ASCEND = Backend(
    name="ascend",
    lowered_as=PLATFORMS,
    registered_as=PLATFORMS,
    reported_as=PLATFORMS,
    targets={
        "dequant_rope_quant_kvcache": Target(
            "dequant_rope_quant_kvcache_ascend", refusal=refusal, prepare=prepare
        )
    },
    unavailable=unavailable,
    is_here=lambda: ascend_plugin.name() is not None,
    lowers_elsewhere=True,
    register=ascend_plugin.register,
    report=report,
)
_compat.enable_donation(PLATFORMS)  # exporting for Ascend needs no library
