"""All slot arithmetic: from positions and indices to flat row numbers that are safe to follow.

A slot is the int32 number of a row in a slot space of so many rows; a number outside [0, rows)
names no row, and its token is skipped. Slots move between spaces through `rebase` alone, so that
one sequence's, layer's or device's slot never becomes another's.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

INT32_MAX = 2**31 - 1

Axes = tuple[str, ...]


def _int32(size: Any) -> Any:
    """A size, which may be symbolic under jax.export, as an int32 scalar."""
    return jnp.asarray(size, jnp.int32)


def _count(size: Any) -> Any:
    """0 .. size - 1 in int32; known while tracing unless the size is symbolic."""
    arange = np.arange if isinstance(size, int) else jnp.arange
    return arange(size, dtype=np.int32)


def is_row(slots: jax.Array, rows: Any) -> jax.Array:
    """Whether each slot names one of `rows` rows; one comparison, since negatives are large."""
    return lax.convert_element_type(slots, jnp.uint32) < lax.convert_element_type(
        _int32(rows), jnp.uint32
    )


def rebase(slots: jax.Array, block: Any, rows: Any) -> jax.Array:
    """Slots of one block as slots of the space that is made of such blocks, one after the other.

    Args:
      slots: int32 slots of a block.
      block: the block's number: an int, a NumPy array or an int32 array that broadcasts against
        `slots`. No slot of a negative block, or of one whose rows int32 cannot count, names a row.
      rows: rows per block.

    Returns:
      int32 `block * rows + slot`, or -1 where that is no row of the block.
    """
    inside = is_row(slots, rows)
    most = INT32_MAX // rows if isinstance(rows, int) else INT32_MAX // _int32(rows)
    if isinstance(block, jax.Array) or not isinstance(most, int):
        inside = inside & is_row(jnp.asarray(block, jnp.int32), most)
        base = jnp.asarray(block, jnp.int32) * _int32(rows)
    else:  # numbers that are known while tracing cost the program nothing
        known = (np.asarray(block) >= 0) & (np.asarray(block) < most)
        base = jnp.asarray(np.where(known, block, 0) * rows, jnp.int32)
        if not known.all():
            inside = inside & known
    return jnp.where(inside, base + slots, jnp.full_like(slots, -1))


def contiguous_rows(indices: jax.Array, S: int, C2: Any) -> jax.Array:
    """Row of each token within its own batch's cache, -1 where it does not fit.

    Args:
      indices: [B] int32 start rows.
      S: tokens per batch.
      C2: rows per batch.

    Returns:
      [B, S] int32: indices[b] + s, or -1 when the start is negative or the row is C2 or more.
    """
    step = jnp.arange(S, dtype=jnp.int32)[None, :]
    start = indices[:, None]
    # Compared without adding, since start + step may wrap around.
    valid = (start >= 0) & (start <= _int32(C2 - 1) - step)
    return jnp.where(valid, start + step, jnp.full_like(step, -1))


def batch_slots(indices: jax.Array, S: int, C2: Any, axes: Axes = ()) -> jax.Array:
    """[B, S] slots of contiguous mode, each batch's over its own C2 rows.

    With `axes`, inside a shard's body, C2 is this device's share of the rows.
    """
    if axes:
        rows = contiguous_rows(indices.reshape(-1), S, C2 * lax.axis_size(axes))
        return jnp.where(rows >= 0, shard_positions(rows, C2, axes), jnp.full_like(rows, -1))
    if S == 1:  # nothing to add, and a slot outside the rows is skipped in any case
        return indices.reshape(-1, 1)
    return contiguous_rows(indices.reshape(-1), S, C2)


def flat_batch_slots(indices: jax.Array, B: Any, S: int, C2: Any, axes: Axes = ()) -> jax.Array:
    """[B * S] slots of contiguous mode over the rows of all batches."""
    rows = batch_slots(indices, S, C2, axes)
    return rebase(rows, _count(B)[:, None], C2).reshape(-1)


def block_table_slots(block_table: jax.Array, positions: jax.Array, block_size: int) -> jax.Array:
    """[B, S] slots of the rows that hold `positions`; see the public `slots_from_block_table`."""
    entries = block_table.shape[1]
    entry = positions // block_size
    known = (positions >= 0) & (entry < entries)
    if not isinstance(entries, int) or entries:
        last = jnp.maximum(_int32(entries) - 1, 0)
        blocks = jnp.take_along_axis(block_table, jnp.clip(entry, 0, last), axis=1)
    else:
        blocks = jnp.full_like(positions, -1)
    row = jnp.where(known, positions % block_size, -1)
    return rebase(row, blocks, block_size)


def group_slots(slots: jax.Array, rows: Any) -> jax.Array:
    """[*g, T] slots of each group's `rows` rows as slots over the rows of all groups."""
    groups = slots.shape[:-1]
    if not groups:
        return jnp.where(is_row(slots, rows), slots, jnp.full_like(slots, -1))
    return rebase(slots, _count(math.prod(groups)).reshape(*groups, 1), rows)


def unravel(slots: jax.Array, row_dims: Sequence[Any]) -> list[jax.Array]:
    """One index per row dimension; a slot that is no row gets a first index past the end.

    JAX's scatter wraps negative indices, also where it drops those past the end.
    """
    capacity = _int32(math.prod(row_dims))
    slots = jnp.where(is_row(slots, capacity), slots, capacity)
    return unravel_in_bounds(slots, row_dims)


def unravel_in_bounds(slots: jax.Array, row_dims: Sequence[Any]) -> list[jax.Array]:
    """One index per row dimension of slots that are all rows."""
    index: list[jax.Array] = []
    for size in reversed(row_dims[1:]):
        index.append(slots % _int32(size))
        slots = slots // _int32(size)
    return [slots, *reversed(index)]


def axes_named(axis_name: Any) -> Axes:
    """The mesh axes of an `axis_name` argument: None, one name, or several."""
    if axis_name is None:
        return ()
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def shard_positions(positions: jax.Array, rows: Any, axes: Axes) -> jax.Array:
    """Inside a shard's body: positions counted from the first of this device's `rows` rows.

    A position past this device's rows stays past them, and one before them becomes negative.
    """
    # A position below -1 could wrap around, and means the same as -1.
    return jnp.maximum(positions, -1) - lax.axis_index(axes) * _int32(rows)


def shard_slots(
    slots: jax.Array, row_dims: Sequence[Any], axes: Sequence[Axes], shards: Sequence[int]
) -> jax.Array:
    """Slots of the whole cache as slots of this device's shard, -1 for those of other shards.

    Args:
      slots: int32 slots over the whole cache's row dimensions.
      row_dims: the shard's row dimensions.
      axes: the mesh axes of each row dimension.
      shards: the number of shards of each row dimension.

    Returns:
      int32 slots over `row_dims`, or -1.
    """
    own = slots >= 0
    local, stride, rest = jnp.zeros_like(slots), jnp.int32(1), slots
    for i in reversed(range(len(row_dims))):
        size = _int32(row_dims[i])
        # The first dimension takes all that is left, so that a slot past the end of the whole cache
        # is past the end of every shard.
        coordinate = rest % (size * shards[i]) if i else rest
        rest = rest // (size * shards[i])
        if axes[i]:
            coordinate = coordinate - lax.axis_index(axes[i]) * size
        own = own & (coordinate >= 0) & (coordinate < size)
        local, stride = local + coordinate * stride, stride * size
    return jnp.where(own, local, jnp.full_like(local, -1))
