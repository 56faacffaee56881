"""Says which implementation a call of `dequant_rope_quant_kvcache` would run, and why."""

from collections.abc import Sequence
from typing import Any, Literal

import jax

from jax_kvcache.ops.dequant_rope_quant_kvcache.api import canonical_operands
from jax_kvcache.ops.dequant_rope_quant_kvcache.checks import Call, check_call
from jax_kvcache.ops.dequant_rope_quant_kvcache.columns import joined
from jax_kvcache.ops.dequant_rope_quant_kvcache.primitive import NAME
from jax_kvcache.ops.implementation import Explanation, Implementation, explain_choice

Array = jax.Array | jax.ShapeDtypeStruct
Columns = Array | tuple[Array, Array, Array]


def explain(
    x: Columns,
    cos: Array,
    sin: Array,
    k_cache: Array,
    v_cache: Array,
    indices: Array,
    scale_k: Array,
    scale_v: Array,
    size_splits: Sequence[int] | None = None,
    *,
    offset_k: Array | None = None,
    offset_v: Array | None = None,
    weight_scale: Columns | None = None,
    activation_scale: Array | None = None,
    bias: Columns | None = None,
    quant_mode: Literal["static"] = "static",
    layout: Literal["BSND"] = "BSND",
    kv_output: bool = False,
    cache_mode: Literal["contiguous", "page"] = "contiguous",
    indices_mode: Literal["drop", "promise_in_bounds"] = "drop",
    implementation: Implementation = None,
    num_q_heads: int | None = None,
    qkv_shards: int | None = None,
    platform: str | None = None,
) -> Explanation:
    """Says which implementation `dequant_rope_quant_kvcache` would run for these arguments.

    Takes the operator's arguments, and nothing is computed: arrays may be given as
    `jax.ShapeDtypeStruct`.

    Args:
      x, cos, sin, k_cache, v_cache, indices, scale_k, scale_v, size_splits, offset_k, offset_v,
      weight_scale, activation_scale, bias, quant_mode, layout, kv_output, cache_mode, indices_mode,
      implementation, num_q_heads, qkv_shards: as for `dequant_rope_quant_kvcache`.
      platform: the platform to answer for; None is JAX's default backend.

    Returns:
      An `Explanation` (platform, implementation, reason).

    Raises:
      TypeError, ValueError: as `dequant_rope_quant_kvcache`.
    """
    call = Call(
        x, cos, sin, k_cache, v_cache, indices, scale_k, scale_v, size_splits,
        offset_k, offset_v, weight_scale, activation_scale, bias,
        quant_mode, layout, kv_output, cache_mode, indices_mode, implementation,
        num_q_heads=num_q_heads, qkv_shards=qkv_shards,
    )  # fmt: skip
    return explain_choice(NAME, platform, _operand_types(call), implementation)


def _operand_types(call: Call) -> Any:
    """The types of the primitive's operands, without any array's values."""
    call = joined(call)
    check_call(call)
    call = call._replace(size_splits=None)  # it was checked, and may be an iterator
    arrays = {k: v for k, v in call._asdict().items() if getattr(v, "shape", ()) != ()}
    return jax.eval_shape(
        lambda arrays: canonical_operands(call._replace(**arrays))[0],
        {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in arrays.items()},
    )
