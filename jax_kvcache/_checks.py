"""The operator's argument checks: everything that a wrong call gets, before anything runs."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

INT32_MAX = 2**31 - 1

_INT = (jnp.dtype("int32"),)
_INT8 = (jnp.dtype("int8"),)
_FLOAT32 = (jnp.dtype("float32"),)
FLOATS = (jnp.dtype("float16"), jnp.dtype(jnp.bfloat16), jnp.dtype("float32"))


class Call(NamedTuple):
    """The public function's arguments; see `dequant_rope_quant_kvcache`."""

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


def _shape(dims) -> str:
    return "[" + ", ".join(str(d) for d in dims) + "]"


def check_array(name, value, dtypes, ranks):
    """Raises TypeError unless `value` is an array of one of the dtypes and ranks."""
    if value is None:
        raise TypeError(f"`{name}` is required, got None.")
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise TypeError(f"`{name}` must be an array, got {type(value).__name__}.")
    if value.dtype not in dtypes:
        expected = " or ".join(d.name for d in dtypes)
        raise TypeError(f"`{name}` must have dtype {expected}, got {value.dtype}.")
    if len(value.shape) not in ranks:
        expected = " or ".join(f"{r}-D" for r in ranks)
        raise TypeError(
            f"`{name}` must be {expected}, got {len(value.shape)}-D {_shape(value.shape)}."
        )


def check_shape(name, value, *allowed):
    """Raises ValueError unless the shape is one of `allowed`, pairs of letters and numbers."""
    if not any(tuple(value.shape) == tuple(dims) for _, dims in allowed):
        expected = " or ".join(f"[{letters}] = {_shape(dims)}" for letters, dims in allowed)
        raise ValueError(f"`{name}` must have shape {expected}, got {_shape(value.shape)}.")


def check_choice(name, value, choices):
    """Raises ValueError unless `value` is one of `choices`."""
    scalar = value is None or isinstance(value, str | bool | np.bool_)
    if not scalar or value not in choices:
        raise ValueError(f"`{name}` must be {' or '.join(map(repr, choices))}, got {value!r}.")


def check_positive(name, value, letters):
    """Raises ValueError for an empty dimension."""
    for letter, size in zip(letters, value.shape, strict=True):
        if isinstance(size, int) and size < 1:
            raise ValueError(f"`{name}` has an empty dimension: {letter} = {size}.")


def check_row_count(name, letters, dims):
    """Raises ValueError when slots of so many rows cannot be counted in int32."""
    if all(isinstance(d, int) for d in dims) and (rows := int(np.prod(dims, dtype=object))) > (
        INT32_MAX
    ):
        raise ValueError(
            f"`{name}` must have at most {INT32_MAX} rows in one slot space, got "
            f"{letters} = {rows}. Split the cache."
        )


def check_offsets_together(offset_k, offset_v):
    """Raises ValueError for a lone offset, which the vendor's operator ignores without a word."""
    if (offset_k is None) != (offset_v is None):
        given, missing = ("k", "v") if offset_v is None else ("v", "k")
        raise ValueError(
            f"`offset_k` and `offset_v` must be given together, got `offset_{given}` without "
            f"`offset_{missing}`. Pass zeros for the one without an offset."
        )


def check_splits(size_splits) -> tuple[int, ...]:
    """Returns three ints; raises TypeError unless `size_splits` is that."""
    try:
        splits = tuple(size_splits)
    except TypeError:
        splits = ()
    if len(splits) != 3 or not all(
        isinstance(s, int | np.integer) and not isinstance(s, bool) for s in splits
    ):
        raise TypeError(
            f"`size_splits` must be three ints (Nq*D, Nkv*D, Nkv*D), got {size_splits!r}."
        )
    return tuple(map(int, splits))  # NumPy's small ints would overflow in their sum


def _check_caches(k_cache, v_cache):
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_array(name, cache, _INT8, (4,))
    if k_cache is v_cache:
        raise ValueError(
            "`k_cache` and `v_cache` must be two arrays, got one array passed as both."
        )
    check_positive("k_cache", k_cache, ("C1", "C2", "Nkv", "D"))
    check_shape("v_cache", v_cache, ("C1, C2, Nkv, D", k_cache.shape))
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
    check_choice("implementation", call.implementation, (None, "ffi", "xla"))

    check_array("x", x, _INT + FLOATS, (2, 3))
    check_positive("x", x, ("B", "S", "H") if len(x.shape) == 3 else ("B", "H"))
    _check_caches(k_cache, call.v_cache)
    B, S, H = (x.shape[0], x.shape[1] if len(x.shape) == 3 else None, x.shape[-1])
    C1, C2, Nkv, D = k_cache.shape
    Nq = _check_size_splits(call.size_splits, H, Nkv, D)
    sizes = Sizes(B, S, H, C1, C2, Nq, Nkv, D)
    letters = ", ".join(("B", "S")[: len(sizes.tokens)])
    num_tokens = B if S is None else B * S

    tables = ("B, D", (B, D)) if S is None else ("B, S, 1, D", (B, S, 1, D))
    table_dtypes = FLOATS if x.dtype in _INT else (jnp.dtype(x.dtype),)
    check_array("cos", call.cos, table_dtypes, (len(tables[1]),))
    check_array("sin", call.sin, (jnp.dtype(call.cos.dtype),), (len(tables[1]),))
    check_shape("cos", call.cos, tables)
    check_shape("sin", call.sin, tables)

    check_array("indices", call.indices, _INT, (1, 2))
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
        check_array(name, value, _FLOAT32, (1, 2))
        check_shape(name, value, ("Nkv, D", (Nkv, D)), ("Nkv*D", (Nkv * D,)))
    if call.weight_scale is None and x.dtype in _INT:
        raise TypeError("`weight_scale` is required when `x` is int32, got None.")
    if call.weight_scale is not None:
        check_array("weight_scale", call.weight_scale, _FLOAT32, (1, 2))
        check_shape("weight_scale", call.weight_scale, ("H", (H,)), ("1, H", (1, H)))
    if call.activation_scale is not None:
        check_array("activation_scale", call.activation_scale, _FLOAT32, (1, 2))
        flat = ("B" if S is None else "B*S", (num_tokens,))
        check_shape("activation_scale", call.activation_scale, flat, (letters, sizes.tokens))
    if call.bias is not None:
        check_array("bias", call.bias, FLOATS + _INT, (1,))
        check_shape("bias", call.bias, ("H", (H,)))

    if cache_mode == "contiguous":
        if isinstance(C1, int) and isinstance(B, int) and C1 < B:
            raise ValueError(
                f"`k_cache` must have C1 >= B = {B} in contiguous mode, got C1 = {C1}."
            )
        if C1 == B:
            check_row_count("k_cache", "C2", (C2,))
            return sizes
    check_row_count("k_cache", "C1*C2", (C1, C2))
    return sizes
