"""The operator's arithmetic in jax.numpy, one function per stage, exact to the bit on CPU."""

import dataclasses
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_kvcache.ops.implementation import Options
from jax_kvcache.ops.operands import Operand, Result, is_absent, table
from jax_kvcache.ops.slots import unravel, unravel_in_bounds


class Operands(NamedTuple):
    """The primitive's operands in order; `ops.operands` explains the dimensions.

    T tokens per group, H = (Nq + 2*Nkv) * D columns, C = prod(r) rows per group.
    """

    # int32, float16, bfloat16 or float32
    x: Annotated[jax.Array, Operand("*g T H")]
    # float16, bfloat16 or float32
    cos: Annotated[jax.Array, Operand("*g T D", flat=True)]
    sin: Annotated[jax.Array, Operand("*g T D", flat=True)]
    # int8
    k_cache: Annotated[jax.Array, Operand("*g *r Nkv D", cache=True)]
    v_cache: Annotated[jax.Array, Operand("*g *r Nkv D", cache=True)]
    # int32, flat row number over r; outside [0, C) skips the token
    slots: Annotated[jax.Array, Operand("*g T")]
    # float32
    scale_k: Annotated[jax.Array, Operand("*g' Nkv D")]
    scale_v: Annotated[jax.Array, Operand("*g' Nkv D")]
    offset_k: Annotated[jax.Array, Operand("*g' Nkv D", optional=True)]
    offset_v: Annotated[jax.Array, Operand("*g' Nkv D", optional=True)]
    weight_scale: Annotated[jax.Array, Operand("*g' H", optional=True)]
    activation_scale: Annotated[jax.Array, Operand("*g T", optional=True)]
    # float32, float16, bfloat16 or int32
    bias: Annotated[jax.Array, Operand("*g' H", optional=True)]


_PROJECTION = ("x", "cos", "sin", "weight_scale", "activation_scale", "bias")
_Q = Result("*g T Nq D", dtype_of="cos", reads=_PROJECTION, flat=True)
_KV = Result("*g T Nkv D", dtype_of="cos", reads=_PROJECTION, flat=True, option="kv_output")


class Results(NamedTuple):
    """The primitive's results in order; k and v are [0] unless they are wanted."""

    q: Annotated[jax.Array, _Q]
    k: Annotated[jax.Array, _KV]
    v: Annotated[jax.Array, _KV]
    k_cache: Annotated[jax.Array, Result("*g *r Nkv D", dtype_of="k_cache", aliases="k_cache")]
    v_cache: Annotated[jax.Array, Result("*g *r Nkv D", dtype_of="v_cache", aliases="v_cache")]


@dataclasses.dataclass(frozen=True)
class WriteOptions(Options):
    """The primitive's static parameters.

    Attributes:
      kv_output: whether k and v are results.
      indices_mode: "drop" or "promise_in_bounds".
    """

    kv_output: bool
    indices_mode: str

    def attributes(self) -> dict[str, Any]:
        """What the native target takes beside its operands."""
        return {"kv_output": self.kv_output}


def _round(product):
    """Keeps a product from being fused or reassociated with what follows it.

    XLA:CPU contracts a*b + c into a fused multiply-add and reassociates (a*b)*c where b or c is one
    constant, both of which change bits.  XLA and LLVM do not see through this minimum of the bits,
    which changes none but those of one NaN, all set, to those of another.
    """
    dtype = jnp.dtype(f"uint{8 * product.dtype.itemsize}")
    bits = lax.bitcast_convert_type(product, dtype)
    bits = jnp.minimum(bits, jnp.asarray(jnp.iinfo(dtype).max - 1, dtype))
    return lax.bitcast_convert_type(bits, product.dtype)


def _divide(value, scale):
    """value / scale, correctly rounded; both float32.

    XLA turns the division by a broadcast into a multiplication by reciprocals.  It does not see the
    broadcast in a minimum with bits of `value`, which is fused; behind an optimisation barrier, the
    broadcast would be an array in memory.  The bits are those of some negative NaN, the largest
    there are, so that the minimum is `scale` or, for a NaN, a NaN.  (Values that are one constant
    while XLA compiles do not hide the broadcast.)
    """
    nan = lax.bitcast_convert_type(value, jnp.uint32) | jnp.uint32(0xFFC00000)
    bits = lax.bitcast_convert_type(jnp.broadcast_to(scale, value.shape), jnp.uint32)
    return value / lax.bitcast_convert_type(jnp.minimum(bits, nan), jnp.float32)


def dequantize(x, weight_scale, activation_scale, bias):
    """float32 values of the int32 accumulators of a W8A8 matmul.

    Args:
      x: [*g, T, H] int32.
      weight_scale: [*g', H] float32.
      activation_scale: [*g, T] float32, or None.
      bias: [*g', H], or None; an int32 bias is added (wrapping) before the scales, a float bias
        after them.

    Returns:
      [*g, T, H] float32.
    """
    bias = None if bias is None else jnp.expand_dims(bias, -2)
    if bias is not None and bias.dtype == jnp.int32:
        x = x + jnp.broadcast_to(bias, x.shape)
    y = x.astype(jnp.float32)
    y = _round(y * jnp.expand_dims(weight_scale, -2))
    if activation_scale is not None:
        y = _round(y * jnp.expand_dims(activation_scale, -1))
    if bias is not None and bias.dtype != jnp.int32:
        y = y + bias.astype(jnp.float32)
    return y


def apply_rope(x, cos, sin):
    """Rotates each head by halves: the pairs are (x[j], x[j + D/2]).

    XLA:CPU computes the operands of a concatenation into arrays in memory, and copies them.  So the
    halves come back apart, and are joined when they have the smaller dtype of the results.

    Args:
      x: [*g, T, N, D] in the compute dtype (float16 or float32).
      cos, sin: [*g, T, D] in the same dtype; their two halves are independent values.

    Returns:
      The first and the second half, [*g, T, N, D/2]; every product and every sum rounded once to
      the compute dtype.
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = jnp.expand_dims(cos, -2), jnp.expand_dims(sin, -2)
    return (
        _round(second * -sin[..., :half]) + _round(first * cos[..., :half]),
        _round(first * sin[..., half:]) + _round(second * cos[..., half:]),
    )


def quantize_int8(value, scale, offset):
    """int8 codes clip(rint(value / scale + offset), -128, 127), half to even, NaN to 0.

    Args:
      value: [*g, T, Nkv, D] float16, bfloat16 or float32; used as float32.
      scale: [*g', Nkv, D] float32.
      offset: [*g', Nkv, D] float32, or None.

    Returns:
      [*g, T, Nkv, D] int8.
    """
    z = _divide(value.astype(jnp.float32), jnp.expand_dims(scale, -3))
    if offset is not None:
        z = z + jnp.expand_dims(offset, -3)
    z = lax.round(z, lax.RoundingMethod.TO_NEAREST_EVEN)
    # Selections, because XLA:CPU's minimum and maximum take several instructions to pass NaN on.
    code = jnp.where(z > -128.0, z, -128.0)
    code = jnp.where(z < 127.0, code, 127.0)
    return jnp.where(z == z, code, 0.0).astype(jnp.int8)


def write_rows(cache, slots, rows, mode):
    """Writes each token's row to its slot and leaves every other row as it is.

    Args:
      cache: [*g, *r, Nkv, D] int8.
      slots: [*g, T] int32, flat row numbers over r.
      rows: [*g, T, Nkv, D] int8.
      mode: "drop" (a slot outside [0, C) is skipped) or "promise_in_bounds".

    Returns:
      The cache; the same buffer when it is donated.
    """
    group_rank = slots.ndim - 1
    row_dims = cache.shape[group_rank:-2]
    index = unravel(slots, row_dims) if mode == "drop" else unravel_in_bounds(slots, row_dims)

    def write_group(cache, index, rows):
        return cache.at[tuple(index)].set(rows, mode=mode)

    for _ in range(group_rank):
        write_group = jax.vmap(write_group)
    return write_group(cache, index, rows)


def _halves(parameter):
    return (None, None) if parameter is None else jnp.split(parameter, 2, axis=-1)


def _join(halves):
    """Both halves of each head, side by side.

    As integers of their size: XLA:CPU of JAX 0.10.2 joins bfloat16 in float32.
    """
    halves = list(halves)
    dtype = halves[0].dtype
    bits = jnp.dtype(f"uint{8 * dtype.itemsize}")
    joined = jnp.concatenate([lax.bitcast_convert_type(half, bits) for half in halves], axis=-1)
    return lax.bitcast_convert_type(joined, dtype)


def dequant_rope_quant_kvcache_reference(
    operands: Operands, options: WriteOptions, platform: str
) -> Results:
    """The whole operator on the primitive's operands; the same on every platform."""
    del platform
    ops = operands
    num_kv_heads, head_dim = ops.k_cache.shape[-2:]
    dtype = ops.cos.dtype
    optional = {
        name: None if is_absent(value) else value
        for name, value in ops._asdict().items()
        if table(Operands)[name].optional
    }
    if ops.x.dtype == jnp.int32:
        y = dequantize(
            ops.x, optional["weight_scale"], optional["activation_scale"], optional["bias"]
        )
    else:
        y = ops.x
    compute_dtype = jnp.float16 if dtype == jnp.float16 else jnp.float32
    heads = y.reshape(*y.shape[:-1], y.shape[-1] // head_dim, head_dim)
    num_q_heads = heads.shape[-2] - 2 * num_kv_heads
    q, k, v = jnp.split(heads, [num_q_heads, num_q_heads + num_kv_heads], axis=-2)
    cos, sin = ops.cos.astype(compute_dtype), ops.sin.astype(compute_dtype)
    # q and k are rotated apart, so that XLA computes each where it is used.
    q, k = (apply_rope(a.astype(compute_dtype), cos, sin) for a in (q, k))
    k_codes = _join(map(quantize_int8, k, _halves(ops.scale_k), _halves(optional["offset_k"])))
    v_codes = quantize_int8(v, ops.scale_v, optional["offset_v"])
    write = partial(write_rows, slots=ops.slots, mode=options.indices_mode)
    k_cache = write(ops.k_cache, rows=k_codes)
    v_cache = write(ops.v_cache, rows=v_codes)

    def output(halves):
        return _join(half.astype(dtype) for half in halves)

    empty = jnp.zeros((0,), dtype)
    k, v = (output(k), v.astype(dtype)) if options.kv_output else (empty, empty)
    return Results(output(q), k, v, k_cache, v_cache)
