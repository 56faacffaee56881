"""Checks of arguments that operators and caches share, with the wording of their errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_kvcache.ops.slots import INT32_MAX, Axes, axes_named

INT8 = (jnp.dtype("int8"),)
INT32 = (jnp.dtype("int32"),)
FLOAT32 = (jnp.dtype("float32"),)
FLOATS = (jnp.dtype("float16"), jnp.dtype(jnp.bfloat16), jnp.dtype("float32"))


def _shape(dims) -> str:
    return "[" + ", ".join(str(d) for d in dims) + "]"


def check_array(name, value, dtypes, ranks):
    """Raises TypeError unless `value` is an array of one of the dtypes and ranks."""
    if value is None:
        raise TypeError(f"`{name}` is required, got None.")
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise TypeError(f"`{name}` must be an array, got {type(value).__name__}.")
    check_dtype(name, value.dtype, dtypes)
    if len(value.shape) not in ranks:
        expected = " or ".join(f"{r}-D" for r in ranks)
        raise TypeError(
            f"`{name}` must be {expected}, got {len(value.shape)}-D {_shape(value.shape)}."
        )


def check_dtype(name, dtype, dtypes):
    """Raises TypeError unless `dtype` is one of the dtypes."""
    if dtype not in dtypes:
        expected = " or ".join(d.name for d in dtypes)
        raise TypeError(f"`{name}` must have dtype {expected}, got {dtype}.")


def check_shape(name, value, *allowed):
    """Raises ValueError unless the shape is one of `allowed`, pairs of letters and numbers."""
    if not any(tuple(value.shape) == tuple(dims) for _, dims in allowed):
        expected = " or ".join(f"[{letters}] = {_shape(dims)}" for letters, dims in allowed)
        raise ValueError(f"`{name}` must have shape {expected}, got {_shape(value.shape)}.")


def is_int(value: Any) -> bool:
    """Whether it is an int of Python or NumPy; a bool is none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_int(name: str, value: Any, least: int | None = None) -> int:
    """Returns `value` as Python's int, whose arithmetic does not overflow.

    Raises:
      TypeError: it is no int of Python or NumPy.
      ValueError: it is below `least`.
    """
    if not is_int(value):
        raise TypeError(f"`{name}` must be an int, got {value!r}.")
    if least is not None and value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    return int(value)


def are_scales(values: np.ndarray) -> np.ndarray:
    """Which numbers can be scales: normal float32 above 0, which no device flushes to zero."""
    return np.isfinite(values) & (values >= np.finfo(np.float32).tiny)


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


def check_axis_name(axis_name: Any) -> Axes:
    """Returns the mesh axes of an `axis_name` argument; none for None.

    Raises:
      TypeError: it is no string and no tuple of strings.
      ValueError: the place of the call has no such axis.
    """
    known = axis_name is None or isinstance(axis_name, str | tuple | list)
    if not known or not all(isinstance(name, str) for name in axes_named(axis_name)):
        raise TypeError(
            f"`axis_name` must be a string, a tuple of strings or None, got {axis_name!r}."
        )
    axes = axes_named(axis_name)
    try:
        lax.axis_size(axes)
    except NameError as error:
        raise ValueError(
            "`axis_name` must name mesh axes that are manual where it is used, inside "
            f"jax.shard_map, got {axis_name!r}."
        ) from error
    return axes


def check_int32(
    name: str, value: ArrayLike, letters: str, dims: tuple[int | None, ...] | None = None
) -> jax.Array:
    """Returns `value` as an int32 array; raises unless it is one, with the dimensions given.

    Numbers without a dtype (a list) are taken when they fit into int32.
    """
    if value is None:
        raise TypeError(f"`{name}` is required, got None.")
    if not hasattr(value, "dtype"):
        value = fitting_int32(name, value)
    check_array(name, value, (jnp.dtype("int32"),), (letters.count(",") + 1,))
    value = jnp.asarray(value)
    dims = dims or value.shape
    if any(want not in (None, got) for want, got in zip(dims, value.shape, strict=True)):
        numbers = ", ".join("any" if d is None else str(d) for d in dims)
        raise ValueError(
            f"`{name}` must have shape [{letters}] = [{numbers}], got {list(value.shape)}."
        )
    return value


def fitting_int32(name: str, value: Any) -> np.ndarray:
    """Integers of any dtype as int32; raises unless they are integers, and fit."""
    array = np.asarray(value)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"`{name}` must have dtype int32, got {array.dtype}.")
    if array.size and (array.min() < -INT32_MAX - 1 or array.max() > INT32_MAX):
        worst = max(array.max(), array.min(), key=abs)
        raise ValueError(f"`{name}` must fit into int32, got {worst}.")
    return array.astype(np.int32)
