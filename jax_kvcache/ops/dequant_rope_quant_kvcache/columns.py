"""The columns of x: given as one array or as (q, k, v), how many heads, and in which order.

Inside `jax.shard_map` a device's columns are [q | k | v] of its own heads only if somebody has put
them in that order: cutting the plain order into equal parts gives other columns of the same shape.
"""

import itertools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from jax_kvcache._compat import varying_axes
from jax_kvcache.ops.checks import FLOAT32, FLOATS, INT32, check_dtype, check_int

_FIX = (
    "Put the columns of the projection's weight, `weight_scale` and `bias` in order with "
    "`interleave_qkv_for_tensor_parallel(w, size_splits, {0})` and pass `qkv_shards={0}`, or pass "
    "`x`, `weight_scale` and `bias` as tuples (q, k, v)."
)


COLUMN_DTYPES = {"x": INT32 + FLOATS, "weight_scale": FLOAT32, "bias": FLOATS + INT32}


def joined(call: Any) -> Any:
    """The call with one array, of columns [q | k | v], for what is given as a tuple (q, k, v).

    Args:
      call: its x is an array, or three: [..., Nq*D], [..., Nkv*D], [..., Nkv*D]; its weight_scale
        and bias are None, or alike.

    Raises:
      TypeError: a tuple is not of three arrays of one dtype that the operator takes, only some
        arguments are tuples, or they are and an order is named.
      ValueError: the widths do not fit each other or the cache.
    """
    apart = isinstance(call.x, tuple)
    others = {"weight_scale": call.weight_scale, "bias": call.bias}
    others = {name: value for name, value in others.items() if value is not None}
    for name, value in others.items():
        if isinstance(value, tuple) != apart:
            kind = "a tuple (q, k, v)" if apart else "one array"
            raise TypeError(
                f"`{name}` must be {kind}, as `x` is, got {_kind(value)}. Give all in one form."
            )
    if not apart:
        return call
    if call.qkv_shards is not None:
        raise TypeError(
            f"`qkv_shards` must be None where `x` is a tuple (q, k, v), got {call.qkv_shards}."
        )
    kv_width = math.prod(call.k_cache.shape[-2:])
    x = _join("x", call.x, None, kv_width)
    widths = (x.shape[-1] - 2 * kv_width, kv_width, kv_width)
    return call._replace(
        x=x, **{n: _join(n, value, widths, kv_width) for n, value in others.items()}
    )


def _kind(value: Any) -> str:
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else "one array"


def _join(name: str, parts: tuple, widths: tuple | None, kv_width: int) -> Any:
    if len(parts) != 3 or not all(hasattr(p, "shape") and hasattr(p, "dtype") for p in parts):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(f"`{name}` must be one array or a tuple (q, k, v) of three, got ({kinds}).")
    q, k, v = parts
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"`{name}` must have one dtype for q, k and v, got {q.dtype}, {k.dtype} and {v.dtype}."
        )
    check_dtype(name, q.dtype, COLUMN_DTYPES[name])  # without x64 JAX narrows 64 bits in silence
    got = tuple(part.shape[-1] if part.shape else 0 for part in parts)
    wanted = widths or (got[0], kv_width, kv_width)
    if got != wanted or not q.shape[:-1] == k.shape[:-1] == v.shape[:-1]:
        shapes = " and ".join(str(list(part.shape)) for part in parts)
        raise ValueError(
            f"`{name}` as (q, k, v) must have equal dimensions before the last ones, which must "
            f"be {wanted[0]}, {wanted[1]} and {wanted[2]}, got {shapes}."
        )
    if any(isinstance(part, jax.ShapeDtypeStruct) for part in parts):
        return jax.ShapeDtypeStruct((*q.shape[:-1], sum(got)), q.dtype)
    return jnp.concatenate([jnp.asarray(part) for part in parts], axis=-1)


def manual_axes() -> dict[str, int]:
    """The sizes of the mesh axes of the `jax.shard_map` that we are in, but for those of size 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: mesh.shape[axis] for axis in mesh.manual_axes if mesh.shape[axis] > 1}


def _products(sizes: Any) -> set[int]:
    """The products of all selections of some sizes, 1 for the empty one."""
    sizes = list(sizes)
    return {
        math.prod(some)
        for count in range(len(sizes) + 1)
        for some in itertools.combinations(sizes, count)
    }


def check_num_q_heads(
    num_q_heads: int | None, total_q_heads: int | None, H: int, num_kv_heads: int, head_dim: int
) -> None:
    """Raises ValueError unless x has the columns of as many query heads as it should.

    Args:
      num_q_heads: the number in x, or None.
      total_q_heads: the number of all devices of a `jax.shard_map` together, or None.
      H: columns of x.
      num_kv_heads: Nkv.
      head_dim: D.
    """
    for wanted in (num_q_heads, total_q_heads):
        if wanted is not None:
            check_int("num_q_heads", wanted, 1)
    got = H / head_dim - 2 * num_kv_heads
    shares, over = {1}, ""
    if total_q_heads is not None and (axes := manual_axes()):
        shares, over = _products(axes.values()), f", or a device's share over {axes} of it"
    for wanted in (num_q_heads, total_q_heads):
        if wanted is None or any(got * share == wanted for share in shares):
            continue
        expected = (wanted + 2 * num_kv_heads) * head_dim
        raise ValueError(
            f"`x` must have H = (Nq + 2*Nkv) * D = {expected} with Nq = `num_q_heads` = {wanted}"
            f"{over}, Nkv = {num_kv_heads} and D = {head_dim}, got H = {H}, which is Nq = {got:g}."
        )


def check_order(
    qkv_shards: int | None, per_column: Any, total_q_heads: int | None, got_q_heads: int
) -> None:
    """Compares the order that x's columns are said to have with what is known of the devices.

    Inside `jax.shard_map` the heads are known to be spread over the mesh axes that a parameter
    varies over that has one value per column or channel, and over as many devices as the number of
    all query heads says. Where nobody says then that the order fits, this warns.

    Args:
      qkv_shards: for how many shards the columns were put in order; 1 is the plain order.
      per_column: weight_scale, bias, scales and offsets; None for absent ones.
      total_q_heads: the number of query heads of all devices together, or None.
      got_q_heads: the number that x has.

    Raises:
      ValueError: `qkv_shards` is no number of devices that share the heads.
    """
    if qkv_shards is not None:
        check_int("qkv_shards", qkv_shards, 1)
    axes = manual_axes()
    varying = {
        axis
        for value in per_column
        if isinstance(value, jax.Array)
        for axis in varying_axes(jax.typeof(value))
    }
    over = {axis: size for axis, size in axes.items() if axis in varying}
    possible = _products((over or axes).values()) - ({1} if over else set())
    if total_q_heads == got_q_heads:
        possible.add(1)
    elif total_q_heads is not None:
        possible = {n for n in _products(axes.values()) if n * got_q_heads == total_q_heads}
    known = bool(over) or 1 not in possible  # that the heads are shared
    if qkv_shards in possible or (qkv_shards is None and not known):
        return
    if not axes:
        raise ValueError(
            f"`qkv_shards` must be 1 or None outside `jax.shard_map`, where `x` has the columns of "
            f"all heads in the plain order [q | k | v], got {qkv_shards}. Undo the interleaving "
            f"with `deinterleave_qkv_for_tensor_parallel(w, size_splits, {qkv_shards})`."
        )
    where = f"`jax.shard_map` with the heads over {over or axes}"
    fix = _FIX.format(max(possible))
    if qkv_shards is not None:
        allowed = " or ".join(map(str, sorted(possible)))
        raise ValueError(f"`qkv_shards` must be {allowed} inside {where}, got {qkv_shards}. {fix}")
    warnings.warn(
        f"Inside {where}, each device needs the columns [q | k | v] of its own heads, and nothing "
        f"says that `x` has them. {fix}",
        stacklevel=5,
    )
