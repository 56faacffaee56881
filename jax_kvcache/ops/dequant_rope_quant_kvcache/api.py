"""The public function: argument checks, the canonical form, and what comes back."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_kvcache.export import register_namedtuple_serialization
from jax_kvcache.ops.dequant_rope_quant_kvcache.checks import (
    Call,
    Sizes,
    check_call,
    has_rows_per_batch,
)
from jax_kvcache.ops.dequant_rope_quant_kvcache.columns import check_order, joined
from jax_kvcache.ops.dequant_rope_quant_kvcache.primitive import bind
from jax_kvcache.ops.dequant_rope_quant_kvcache.reference import Operands, WriteOptions
from jax_kvcache.ops.implementation import Implementation
from jax_kvcache.ops.operands import absent
from jax_kvcache.ops.slots import batch_slots, flat_batch_slots, rebase, shard_slots

Columns = jax.Array | tuple[jax.Array, jax.Array, jax.Array]  # as one array, or (q, k, v)


@register_namedtuple_serialization
class DequantRopeQuantKvcacheResult(NamedTuple):
    """What `dequant_rope_quant_kvcache` returns."""

    q: jax.Array
    k: jax.Array | None
    v: jax.Array | None
    k_cache: jax.Array
    v_cache: jax.Array


def _slots(call: Call, sizes: Sizes) -> jax.Array:
    """The slot of each token: [B, S] over its batch's rows, or [T] over all rows."""
    indices = jnp.asarray(call.indices)
    S = 1 if sizes.S is None else sizes.S
    if has_rows_per_batch(call):
        return batch_slots(indices, S, sizes.C2, call.axes)
    if call.cache_mode == "contiguous":
        slots = flat_batch_slots(indices, sizes.B, S, sizes.C2, call.axes)
    else:
        slots = indices.reshape(-1)
        if call.axes:
            shards = (lax.axis_size(call.axes),)
            rows = (sizes.C1 * sizes.C2,)
            slots = shard_slots(slots, rows, (call.axes,), shards, keep_past=True)
    if call.layer is None:
        return slots
    layer = jnp.where(call.layer.exists, call.layer.number, jnp.int32(-1))
    return rebase(slots, layer, sizes.C1 * sizes.C2, keep_past=True)


def canonical_operands(call: Call) -> tuple[Operands, Sizes]:
    """Checks a call of the public function and puts it in the primitive's form.

    Contiguous with C1 == B: groups (B,), rows (C2,). Page, and contiguous with C1 > B: no groups,
    rows (C1, C2). One layer of many: no groups, rows (L, C1, C2). The caches stay as they are; a
    reshape would copy them.
    """
    apart = isinstance(call.x, tuple)
    call = joined(call)
    sizes = check_call(call)
    if not apart:
        scales = (call.scale_k, call.scale_v, call.offset_k, call.offset_v)
        per_column = (call.weight_scale, call.bias, *scales)
        check_order(call.qkv_shards, per_column, call.total_q_heads, sizes.Nq)
    per_batch = has_rows_per_batch(call)
    S = 1 if sizes.S is None else sizes.S
    tokens = (sizes.B, S) if per_batch else (sizes.B * S,)

    def per_token(value, *trailing):
        return jnp.asarray(value).reshape(*tokens, *trailing)

    def parameter(value, *shape):
        if value is None:
            return absent()
        return jnp.asarray(value).reshape((1, *shape) if per_batch else shape)

    is_accumulator = call.x.dtype == jnp.int32
    activation_scale = call.activation_scale if is_accumulator else None
    heads = (sizes.Nkv, sizes.D)
    operands = Operands(
        x=per_token(call.x, sizes.H),
        cos=per_token(call.cos, sizes.D),
        sin=per_token(call.sin, sizes.D),
        k_cache=call.k_cache,
        v_cache=call.v_cache,
        slots=_slots(call, sizes),
        scale_k=parameter(call.scale_k, *heads),
        scale_v=parameter(call.scale_v, *heads),
        offset_k=parameter(call.offset_k, *heads),
        offset_v=parameter(call.offset_v, *heads),
        weight_scale=parameter(call.weight_scale if is_accumulator else None, sizes.H),
        activation_scale=absent() if activation_scale is None else per_token(activation_scale),
        bias=parameter(call.bias if is_accumulator else None, sizes.H),
    )
    return operands, sizes


def _without_effect(call: Call, x_dtype: Any) -> str:
    """Names the arguments that a call with a float x has and that change nothing; "" for none."""
    names = ("weight_scale", "activation_scale", "bias")
    given = [f"`{name}`" for name in names if getattr(call, name) is not None]
    if x_dtype == jnp.int32 or not given:
        return ""
    return f"{' and '.join(given)} {'has' if len(given) == 1 else 'have'}"


def run(call: Call, *, refuse_without_effect: bool = False) -> DequantRopeQuantKvcacheResult:
    """Checks a call and runs it: the one way in, for whole caches and for one layer of many.

    Arguments that a float x has no use for are an error if `refuse_without_effect`, else a warning.
    """
    operands, sizes = canonical_operands(call)
    if ignored := _without_effect(call, operands.x.dtype):
        message = (
            f"{ignored} no effect where `x` is {operands.x.dtype}: dequantising, scaling and "
            "adding are for int32 accumulators. Apply them to `x` first, or leave them out."
        )
        if refuse_without_effect:
            raise TypeError(message)
        warnings.warn(message, stacklevel=3)
    options = WriteOptions(
        implementation=call.implementation,
        kv_output=bool(call.kv_output),
        indices_mode=str(call.indices_mode),
    )
    q, k, v, k_cache, v_cache = bind(operands, options)

    def heads(tokens: jax.Array, num_heads: int) -> jax.Array:
        return tokens.reshape(*sizes.tokens, num_heads, sizes.D)

    q = heads(q, sizes.Nq)
    if not call.kv_output:
        return DequantRopeQuantKvcacheResult(q, None, None, k_cache, v_cache)
    k, v = heads(k, sizes.Nkv), heads(v, sizes.Nkv)
    return DequantRopeQuantKvcacheResult(q, k, v, k_cache, v_cache)


def dequant_rope_quant_kvcache(
    x: Columns,
    cos: jax.Array,
    sin: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    indices: jax.Array,
    scale_k: jax.Array,
    scale_v: jax.Array,
    size_splits: Sequence[int] | None = None,
    *,
    offset_k: jax.Array | None = None,
    offset_v: jax.Array | None = None,
    weight_scale: Columns | None = None,
    activation_scale: jax.Array | None = None,
    bias: Columns | None = None,
    quant_mode: Literal["static"] = "static",
    layout: Literal["BSND"] = "BSND",
    kv_output: bool = False,
    cache_mode: Literal["contiguous", "page"] = "contiguous",
    indices_mode: Literal["drop", "promise_in_bounds"] = "drop",
    implementation: Implementation = None,
    num_q_heads: int | None = None,
    qkv_shards: int | None = None,
) -> DequantRopeQuantKvcacheResult:
    """Dequantises a fused qkv projection, rotates q and k, and writes int8 k and v into the cache.

    This is the arithmetic of CANN's aclnnDequantRopeQuantKvcache, operation by operation and exact
    to the bit on CPU; every step rounds once, to nearest even:

    1. int32 x: y = float32(x) * weight_scale * activation_scale + bias (a float bias), or
       y = float32(x + bias) * weight_scale * activation_scale (an int32 bias, wrapping).
    2. RoPE by halves, h = D/2, in float16 for float16 tables and in float32 for the others:
       out[j] = (x[j+h] * -sin[j]) + (x[j] * cos[j]);
       out[j+h] = (x[j] * sin[j+h]) + (x[j+h] * cos[j+h]).
    3. code = clip(rint(value / scale + offset), -128, 127), half to even, NaN to 0; value is k
       after RoPE (before rounding to bfloat16) and v before rounding.
    4. contiguous: batch b writes rows indices[b] .. indices[b]+S-1 of cache[b]; page: token t
       writes row indices[t] of the cache seen as [C1*C2, Nkv, D].
       The vendor forbids two tokens of one call in one row; here each byte is one's.

    Inside `jax.jit` with the caches donated (`donate_argnames=("k_cache", "v_cache")`) the caches
    are updated in place. Called eagerly, nothing is donated and both caches are copied.

    A negative index, and a row at or past the end, is skipped: no row but those named is ever
    touched. q, k and v of a skipped token are computed as usual. When tokens of one call share a
    row, each byte of it comes from one of them.

    Under `jax.vmap`, an unmapped cache with mapped tokens is broadcast: each example writes a copy
    of its own. Map the cache too, or use page mode, to stay in place.

    Over several devices the operator follows the caches: shard B (or page mode's blocks) and Nkv,
    never D. In automatic and explicit mode it sees whole arrays, and x has its columns in the plain
    order [q | k | v], also where they are sharded. Inside `jax.shard_map` each device calls it on
    its own arrays and needs the columns [q | k | v] of its own heads, which equal parts of the
    plain order are not. Two ways cannot be wrong without an error: x, weight_scale and bias as
    tuples (q, k, v), each cut into equal parts; or one array that
    `interleave_qkv_for_tensor_parallel` has put in order, with `qkv_shards`, which is compared with
    the mesh. Without either, this warns inside `jax.shard_map` where the heads are seen to be
    shared: where a parameter per column or channel varies over a mesh axis.

    Args:
      x: [B, S, H] or [B, H], H = (Nq + 2*Nkv) * D; int32 accumulators, or float16, bfloat16 or
        float32 (float32 on CPU, GPU and TPU only). Or a tuple (q, k, v) of its columns,
        [..., Nq*D], [..., Nkv*D] and [..., Nkv*D], which are then put together.
      cos: [B, S, 1, D], or [B, D] for a 2-D x; float16, bfloat16 or float32; the dtype of x unless
        x is int32. Its two halves are independent values.
      sin: as cos.
      k_cache: [C1, C2, Nkv, D] int8. C1 >= B in contiguous mode; C1 blocks of C2 rows in page mode.
      v_cache: as k_cache; another array.
      indices: int32; [B] or [B, 1] start rows; in page mode one slot per token: [B*S] or [B, S].
      scale_k: [Nkv, D] or [Nkv*D] float32; the value of one step of the int8 code.
      scale_v: as scale_k.
      size_splits: (Nq*D, Nkv*D, Nkv*D); None works it out from the shapes.
      offset_k: as scale_k, in steps of the code; given together with offset_v or not at all.
      offset_v: as offset_k.
      weight_scale: [H] or [1, H] float32; required when x is int32. A tuple like x where x is one.
        It, activation_scale and bias have no effect on a float x; a warning says so while tracing.
      activation_scale: one per token: [B*S] or [B, S] ([B] for a 2-D x) float32.
      bias: [H] float32, float16, bfloat16 or int32. A tuple like x where x is one.
      quant_mode: "static".
      layout: "BSND".
      kv_output: whether k and v are returned too.
      cache_mode: "contiguous" or "page".
      indices_mode: "drop", or "promise_in_bounds": the caller promises that every index is in
        range, which spares XLA the checks. Native kernels check always.
      implementation: None takes the platform's native target where there is one that can run the
        call, else the jax.numpy reference, with a warning if there is one that cannot; "ffi"
        demands the native target and raises where it cannot be had; "xla" is the reference
        anywhere. `jax_kvcache.explain` says which one a call gets, and why.
      num_q_heads: Nq, to be compared with the columns that x has; None takes what x has.
      qkv_shards: the `shards` that the columns of x were interleaved for; 1 is the plain order.
        None: the plain order, and inside `jax.shard_map` whatever x has.

    Returns:
      A NamedTuple: q [B, S, Nq, D] ([B, Nq, D] for a 2-D x) in the dtype of cos; k, v likewise with
      Nkv heads, or None unless `kv_output`; k_cache, v_cache.

    Raises:
      TypeError: a missing argument, a wrong dtype or rank.
      ValueError: a wrong shape, value or number of heads, one array passed as both caches (seen
        only eagerly), a lone offset, or more than 2**31 - 1 rows.
      NotImplementedError: `implementation="ffi"` where there is no native target; differentiation.
    """
    return run(
        Call(
            x, cos, sin, k_cache, v_cache, indices, scale_k, scale_v, size_splits,
            offset_k, offset_v, weight_scale, activation_scale, bias,
            quant_mode, layout, kv_output, cache_mode, indices_mode, implementation,
            num_q_heads=num_q_heads, qkv_shards=qkv_shards,
        )
    )  # fmt: skip
