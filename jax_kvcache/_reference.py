"""The operator's arithmetic in jax.numpy, one function per stage, exact to the bit on CPU."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Operands(NamedTuple):
    """The primitive's 13 operands, in order.

    `*g` are the group dimensions (possibly none), `*r` the row dimensions (at least one, C rows
    in all), `*g'` has the rank of g with each dimension 1 (shared by all groups) or full.
    An absent optional is a float32 array of shape [0].
    """

    x: jax.Array  # [*g, T, H] int32, float16, bfloat16 or float32
    cos: jax.Array  # [*g, T, D] float16, bfloat16 or float32
    sin: jax.Array  # [*g, T, D]
    k_cache: jax.Array  # [*g, *r, Nkv, D] int8
    v_cache: jax.Array  # [*g, *r, Nkv, D] int8
    slots: jax.Array  # [*g, T] int32, flat row number over r; outside [0, C) skips the token
    scale_k: jax.Array  # [*g', Nkv, D] float32
    scale_v: jax.Array  # [*g', Nkv, D] float32
    offset_k: jax.Array  # [*g', Nkv, D] float32 or [0]
    offset_v: jax.Array  # [*g', Nkv, D] float32 or [0]
    weight_scale: jax.Array  # [*g', H] float32 or [0]
    activation_scale: jax.Array  # [*g, T] float32 or [0]
    bias: jax.Array  # [*g', H] float32, float16, bfloat16, int32 or [0]


def _round(product):
    """Keeps a float32 product from being fused or reassociated with what follows it.

    XLA:CPU contracts a*b + c into a fused multiply-add and reassociates (a*b)*c, both of which
    change bits.  It does not see through this select.
    """
    return jnp.where(product == product, product, jnp.full_like(product, jnp.nan))


def _divide(value, scale):
    """value / scale, correctly rounded; XLA turns division by a broadcast into a reciprocal."""
    return value / lax.optimization_barrier(jnp.broadcast_to(scale, value.shape))


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

    Args:
      x: [*g, T, N, D] in the compute dtype (float16 or float32).
      cos, sin: [*g, T, D] in the same dtype; their two halves are independent values.

    Returns:
      [*g, T, N, D]; every product and every sum rounded once to the compute dtype.
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = jnp.expand_dims(cos, -2), jnp.expand_dims(sin, -2)
    return jnp.concatenate(
        [
            _round(second * -sin[..., :half]) + _round(first * cos[..., :half]),
            _round(first * sin[..., half:]) + _round(second * cos[..., half:]),
        ],
        axis=-1,
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
    code = jnp.clip(lax.round(z, lax.RoundingMethod.TO_NEAREST_EVEN), -128.0, 127.0)
    return jnp.where(z == z, code, jnp.zeros_like(code)).astype(jnp.int8)


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
    if mode == "drop":  # JAX's scatter wraps negative indices, also in drop mode
        capacity = jnp.asarray(math.prod(row_dims), jnp.int32)
        slots = jnp.where((slots >= 0) & (slots < capacity), slots, capacity)
    index: list[jax.Array] = []
    for size in reversed(row_dims[1:]):
        size = jnp.asarray(size, jnp.int32)
        index.append(slots % size)
        slots = slots // size
    index = [slots, *reversed(index)]

    def write_group(cache, index, rows):
        return cache.at[tuple(index)].set(rows, mode=mode)

    for _ in range(group_rank):
        write_group = jax.vmap(write_group)
    return write_group(cache, index, rows)


def dequant_rope_quant_kvcache_reference(*operands, kv_output, indices_mode):
    """The whole operator on the primitive's operands; see `Operands` for shapes and dtypes.

    Returns:
      q [*g, T, Nq, D], k and v [*g, T, Nkv, D] ([0] unless `kv_output`), k_cache, v_cache.
    """
    ops = Operands(*operands)
    num_kv_heads, head_dim = ops.k_cache.shape[-2:]
    dtype = ops.cos.dtype
    optional = {
        name: value if value.shape != (0,) else None
        for name, value in ops._asdict().items()
        if name in ("offset_k", "offset_v", "weight_scale", "activation_scale", "bias")
    }
    if ops.x.dtype == jnp.int32:
        y = dequantize(
            ops.x, optional["weight_scale"], optional["activation_scale"], optional["bias"]
        )
    else:
        y = ops.x
    compute_dtype = jnp.float16 if dtype == jnp.float16 else jnp.float32
    heads = y.reshape(*y.shape[:-1], y.shape[-1] // head_dim, head_dim)
    rotated = apply_rope(
        heads[..., :-num_kv_heads, :].astype(compute_dtype),
        ops.cos.astype(compute_dtype),
        ops.sin.astype(compute_dtype),
    )
    q, k = rotated[..., :-num_kv_heads, :], rotated[..., -num_kv_heads:, :]
    v = heads[..., -num_kv_heads:, :]
    write = partial(write_rows, slots=ops.slots, mode=indices_mode)
    k_cache = write(ops.k_cache, rows=quantize_int8(k, ops.scale_k, optional["offset_k"]))
    v_cache = write(ops.v_cache, rows=quantize_int8(v, ops.scale_v, optional["offset_v"]))
    empty = jnp.zeros((0,), dtype)
    k, v = (k.astype(dtype), v.astype(dtype)) if kv_output else (empty, empty)
    return q.astype(dtype), k, v, k_cache, v_cache
