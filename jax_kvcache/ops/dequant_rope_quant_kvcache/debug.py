"""What `jax.experimental.checkify` finds in a call: tokens that are lost, codes that are saturated.

None of it is in a program that is not transformed by checkify.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jax_kvcache._compat import Finding
from jax_kvcache.ops.dequant_rope_quant_kvcache.reference import Operands, WriteOptions, dequantize
from jax_kvcache.ops.operands import is_absent
from jax_kvcache.ops.slots import INT32_MAX, is_row


def findings(operands: Operands, options: WriteOptions) -> Iterator[Finding]:
    """The findings in one call, on the primitive's operands."""
    del options
    yield _lost_tokens(operands)
    yield _saturated_codes(operands)


def _rows(ops: Operands) -> Any:
    return math.prod(ops.k_cache.shape[ops.slots.ndim - 1 : -2])


def _lost_tokens(ops: Operands) -> Finding:
    slots = ops.slots.reshape(-1)
    lost = slots >= jnp.asarray(_rows(ops), jnp.int32)
    first = jnp.argmax(lost).astype(jnp.int32)
    return Finding(
        failed=lost.any(),
        message=(
            "dequant_rope_quant_kvcache does not write {lost} of {tokens} tokens: they are past "
            "the end of the cache or have no block. The first is token {first} of the call, for "
            f"row {{row}} of {{rows}} (row {INT32_MAX}: past its own sequence's, layer's or block "
            "table's end)"
        ),
        numbers={
            "lost": lost.sum(dtype=jnp.int32),
            "tokens": jnp.int32(slots.size),
            "first": first,
            "row": slots.max(initial=-1, where=jnp.arange(slots.size) == first),
            "rows": jnp.asarray(_rows(ops), jnp.int32),
        },
        out_of_bounds=True,
    )


def _saturated_codes(ops: Operands) -> Finding:
    written = is_row(ops.slots, _rows(ops))[..., None, None]  # [*g, T, 1, 1]

    def outside(code: jax.Array) -> tuple[jax.Array, jax.Array]:
        beyond = written & ((code < -128) | (code > 127))
        return beyond.sum(dtype=jnp.int32), jnp.abs(jnp.where(beyond, code, 0)).max(initial=0)

    (in_k, worst_k), (in_v, worst_v) = map(outside, _unclipped_codes(ops))
    codes = written.sum(dtype=jnp.int32) * math.prod(ops.k_cache.shape[-2:])
    return Finding(
        failed=in_k + in_v > 0,
        message=(
            "dequant_rope_quant_kvcache saturates {k} of {codes} codes of K and {v} of {codes} of "
            "V: rint(value / scale + offset) lies outside [-128, 127]. The largest there is {worst}"
            " or its negative"
        ),
        numbers={"k": in_k, "v": in_v, "codes": codes, "worst": jnp.maximum(worst_k, worst_v)},
        out_of_bounds=False,
    )


def _unclipped_codes(ops: Operands) -> tuple[jax.Array, jax.Array]:
    """rint(value / scale + offset) of K and V, [*g, T, Nkv, D] float32.

    In float32 throughout: next to a rounding boundary it may differ by 1 from what is clipped.
    """
    optional = {
        name: None if is_absent(getattr(ops, name)) else getattr(ops, name)
        for name in ("activation_scale", "bias", "offset_k", "offset_v")
    }
    y = ops.x.astype(jnp.float32)
    if ops.x.dtype == jnp.int32:
        activation_scale, bias = optional["activation_scale"], optional["bias"]
        y = dequantize(ops.x, ops.weight_scale, activation_scale, bias)
    kv_heads, head_dim = ops.k_cache.shape[-2:]
    heads = y.reshape(*y.shape[:-1], y.shape[-1] // head_dim, head_dim)
    k, v = heads[..., -2 * kv_heads : -kv_heads, :], heads[..., -kv_heads:, :]
    cos, sin = (jnp.expand_dims(a.astype(jnp.float32), -2) for a in (ops.cos, ops.sin))
    first, second = jnp.split(k, 2, axis=-1)
    k = k * cos + jnp.concatenate([-second, first], axis=-1) * sin

    def code(value: jax.Array, name: str) -> jax.Array:
        z = value / jnp.expand_dims(getattr(ops, f"scale_{name}"), -3)
        offset = optional[f"offset_{name}"]
        return jnp.rint(z if offset is None else z + jnp.expand_dims(offset, -3))

    return code(k, "k"), code(v, "v")
