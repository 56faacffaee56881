"""The checks of a call of `dequant_rope_quant_kvcache`: what a wrong one gets before it runs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_kvcache.ops.checks import (
    FLOAT32,
    FLOATS,
    INT8,
    INT32,
    check_array,
    check_choice,
    check_offsets_together,
    check_positive,
    check_row_count,
    check_shape,
    is_int,
)
from jax_kvcache.ops.dequant_rope_quant_kvcache.columns import COLUMN_DTYPES, check_num_q_heads
from jax_kvcache.ops.implementation import check_implementation


class Layer(NamedTuple):
    """One layer of a cache with layers: the nearest one, and whether it is the one named."""

    number: jax.Array  # int32 scalar in [0, L)
    exists: jax.Array | bool  # True where it is known while tracing


class Call(NamedTuple):
    """The public function's arguments; see `dequant_rope_quant_kvcache`.

    With `layer` the caches are [L, C1, C2, Nkv, D], and the call is one on that layer. With `axes`,
    inside `jax.shard_map`, the caches are this device's shards over these mesh axes: of the blocks
    in page mode, of the rows otherwise; the indices are those of the whole caches.
    """

    x: Any
    cos: Any
    sin: Any
    k_cache: Any
    v_cache: Any
    indices: Any
    scale_k: Any
    scale_v: Any
    size_splits: Any = None
    offset_k: Any = None
    offset_v: Any = None
    weight_scale: Any = None
    activation_scale: Any = None
    bias: Any = None
    quant_mode: Any = "static"
    layout: Any = "BSND"
    kv_output: Any = False
    cache_mode: Any = "contiguous"
    indices_mode: Any = "drop"
    implementation: Any = None
    layer: Layer | None = None
    axes: tuple[str, ...] = ()
    num_q_heads: int | None = None
    total_q_heads: int | None = None  # a cache's, of all devices together
    qkv_shards: int | None = None


class Sizes(NamedTuple):
    """The call's dimensions, in the operator's letters; S is None for a 2-D x."""

    B: Any
    S: Any
    H: int
    C1: Any
    C2: Any
    Nq: int
    Nkv: int
    D: int

    @property
    def tokens(self):
        """The dimensions that hold the tokens: (B, S), or (B,) for a 2-D x."""
        return (self.B,) if self.S is None else (self.B, self.S)


def check_splits(size_splits) -> tuple[int, ...]:
    """Returns three ints; raises TypeError unless `size_splits` is that."""
    try:
        splits = tuple(size_splits)
    except TypeError:
        splits = ()
    if len(splits) != 3 or not all(map(is_int, splits)):
        raise TypeError(
            f"`size_splits` must be three ints (Nq*D, Nkv*D, Nkv*D), got {size_splits!r}."
        )
    return tuple(map(int, splits))  # NumPy's small ints would overflow in their sum


def _check_caches(k_cache, v_cache, has_layers):
    letters = ("L", "C1", "C2", "Nkv", "D") if has_layers else ("C1", "C2", "Nkv", "D")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_array(name, cache, INT8, (len(letters),))
    if k_cache is v_cache:
        raise ValueError(
            "`k_cache` and `v_cache` must be two arrays, got one array passed as both."
        )
    check_positive("k_cache", k_cache, letters)
    check_shape("v_cache", v_cache, (", ".join(letters), k_cache.shape))
    if k_cache.shape[-1] % 2:
        raise ValueError(f"`k_cache` must have an even head size D, got {k_cache.shape[-1]}.")


def _check_size_splits(size_splits, width, num_kv_heads, head_dim):
    """Returns Nq."""
    kv_width = num_kv_heads * head_dim
    if size_splits is None:
        q_width = width - 2 * kv_width
        if q_width <= 0 or q_width % head_dim:
            raise ValueError(
                f"`x` must have H = (Nq + 2*Nkv) * D with Nkv = {num_kv_heads} and D = {head_dim} "
                f"from `k_cache`, got H = {width}."
            )
        return q_width // head_dim
    splits = check_splits(size_splits)
    q_width = splits[0]
    if splits[1:] != (kv_width, kv_width) or q_width <= 0 or q_width % head_dim:
        raise ValueError(
            f"`size_splits` must be (Nq*{head_dim}, {kv_width}, {kv_width}) for `k_cache` with "
            f"[Nkv, D] = [{num_kv_heads}, {head_dim}], got {splits}."
        )
    if sum(splits) != width:
        raise ValueError(
            f"`size_splits` must add up to H = {width}, got {splits} with sum {sum(splits)}."
        )
    return q_width // head_dim


def check_call(call: Call) -> Sizes:
    """Checks a call of the public function and returns its dimensions."""
    x, k_cache, cache_mode = call.x, call.k_cache, call.cache_mode
    check_choice("quant_mode", call.quant_mode, ("static",))
    check_choice("layout", call.layout, ("BSND",))
    check_choice("kv_output", call.kv_output, (False, True))
    check_choice("cache_mode", cache_mode, ("contiguous", "page"))
    check_choice("indices_mode", call.indices_mode, ("drop", "promise_in_bounds"))
    check_implementation(call.implementation)

    check_array("x", x, COLUMN_DTYPES["x"], (2, 3))
    check_positive("x", x, ("B", "S", "H") if len(x.shape) == 3 else ("B", "H"))
    _check_caches(k_cache, call.v_cache, call.layer is not None)
    B, S, H = (x.shape[0], x.shape[1] if len(x.shape) == 3 else None, x.shape[-1])
    C1, C2, Nkv, D = k_cache.shape[-4:]
    check_num_q_heads(call.num_q_heads, call.total_q_heads, H, Nkv, D)
    Nq = _check_size_splits(call.size_splits, H, Nkv, D)
    sizes = Sizes(B, S, H, C1, C2, Nq, Nkv, D)
    letters = ", ".join(("B", "S")[: len(sizes.tokens)])
    num_tokens = B if S is None else B * S

    tables = ("B, D", (B, D)) if S is None else ("B, S, 1, D", (B, S, 1, D))
    table_dtypes = FLOATS if x.dtype in INT32 else (jnp.dtype(x.dtype),)
    check_array("cos", call.cos, table_dtypes, (len(tables[1]),))
    check_array("sin", call.sin, (jnp.dtype(call.cos.dtype),), (len(tables[1]),))
    check_shape("cos", call.cos, tables)
    check_shape("sin", call.sin, tables)

    check_array("indices", call.indices, INT32, (1, 2))
    if cache_mode == "page" and S is not None:
        check_shape("indices", call.indices, ("B*S", (num_tokens,)), ("B, S", (B, S)))
    else:
        check_shape("indices", call.indices, ("B", (B,)), ("B, 1", (B, 1)))

    check_offsets_together(call.offset_k, call.offset_v)
    per_channel = ("scale_k", "scale_v") + (
        ("offset_k", "offset_v") if call.offset_k is not None else ()
    )
    for name in per_channel:
        value = getattr(call, name)
        check_array(name, value, FLOAT32, (1, 2))
        check_shape(name, value, ("Nkv, D", (Nkv, D)), ("Nkv*D", (Nkv * D,)))
    if call.weight_scale is None and x.dtype in INT32:
        raise TypeError("`weight_scale` is required when `x` is int32, got None.")
    if call.weight_scale is not None:
        check_array("weight_scale", call.weight_scale, COLUMN_DTYPES["weight_scale"], (1, 2))
        check_shape("weight_scale", call.weight_scale, ("H", (H,)), ("1, H", (1, H)))
    if call.activation_scale is not None:
        check_array("activation_scale", call.activation_scale, FLOAT32, (1, 2))
        flat = ("B" if S is None else "B*S", (num_tokens,))
        check_shape("activation_scale", call.activation_scale, flat, (letters, sizes.tokens))
    if call.bias is not None:
        check_array("bias", call.bias, COLUMN_DTYPES["bias"], (1,))
        check_shape("bias", call.bias, ("H", (H,)))

    if cache_mode == "contiguous" and isinstance(C1, int) and isinstance(B, int) and C1 < B:
        raise ValueError(f"`k_cache` must have C1 >= B = {B} in contiguous mode, got C1 = {C1}.")
    if call.axes:
        shards = lax.axis_size(call.axes)
        check_row_count("k_cache", "shards*C1*C2", (shards, C1, C2))
    if call.layer is not None:
        check_row_count("k_cache", "L*C1*C2", k_cache.shape[:3])
    elif has_rows_per_batch(call):
        check_row_count("k_cache", "C2", (C2,))
    else:
        check_row_count("k_cache", "C1*C2", (C1, C2))
    return sizes


def has_rows_per_batch(call: Call) -> bool:
    """Whether each batch's slots count the rows of its own cache, and not those of all."""
    same = call.k_cache.shape[-4] == call.x.shape[0]
    return call.cache_mode == "contiguous" and call.layer is None and same
