"""All slot arithmetic: from positions and indices to flat row numbers that are safe to follow.

A slot is the int32 number of a row in a slot space of so many rows; a number outside [0, rows)
names no row, and its token is skipped. Slots move between spaces through `rebase`, and to those of
a device through `shard_slots`, so that one sequence's, layer's or device's slot never becomes
another's.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

INT32_MAX = 2**31 - 1
_LARGEST_CONSTANT = 4096  # elements that are written into a program; a decoding step has fewer

Axes = tuple[str, ...]  # the mesh axes of one dimension, major first; empty: not sharded


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


def _past_or_negative(slots: jax.Array) -> jax.Array:
    """INT32_MAX, which is past the end of any slot space, for what is not negative, and else -1."""
    return slots | jnp.int32(INT32_MAX)


def rebase(slots: jax.Array, block: Any, rows: Any, *, keep_past: bool = False) -> jax.Array:
    """Slots of one block as slots of the space that is made of such blocks, one after the other.

    Args:
      slots: int32 slots of a block.
      block: the block's number: an int, a NumPy array or an int32 array that broadcasts against
        `slots`. No slot of a negative block, or of one whose rows int32 cannot count, names a row.
      rows: rows per block.
      keep_past: whether a slot that is no row of its block, and not negative, becomes INT32_MAX and
        not -1, so that a check can tell it from padding.

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
    nowhere = _past_or_negative(slots) if keep_past else jnp.full_like(slots, -1)
    return jnp.where(inside, base + slots, nowhere)


def contiguous_rows(indices: jax.Array, S: int) -> jax.Array:
    """Row of each token within its own batch's cache, however many rows that has.

    Args:
      indices: [B] int32 start rows.
      S: tokens per batch.

    Returns:
      [B, S] int32: indices[b] + s, at most INT32_MAX, or -1 when the start is negative.
    """
    if S == 1:  # nothing to add
        return indices.reshape(-1, 1)
    step = jnp.arange(S, dtype=jnp.int32)[None, :]
    start = indices.reshape(-1, 1)
    # Compared without adding, since start + step may wrap around.
    row = jnp.minimum(start, INT32_MAX - step) + step
    return jnp.where(start >= 0, row, jnp.full_like(step, -1))


def batch_slots(indices: jax.Array, S: int, C2: Any, axes: Axes = ()) -> jax.Array:
    """[B, S] slots of contiguous mode, each batch's over its own C2 rows.

    With `axes`, inside a shard's body, C2 is this device's share of the rows. A row past the end
    stays past the end, so that a check can tell it from padding.
    """
    rows = contiguous_rows(indices, S)
    if not axes:
        return rows
    return shard_slots(rows, (C2,), (axes,), (lax.axis_size(axes),), keep_past=True)


def flat_batch_slots(indices: jax.Array, B: Any, S: int, C2: Any, axes: Axes = ()) -> jax.Array:
    """[B * S] slots of contiguous mode over the rows of all batches."""
    rows = batch_slots(indices, S, C2, axes)
    return rebase(rows, _count(B)[:, None], C2, keep_past=True).reshape(-1)


def block_table_slots(
    block_table: jax.Array, positions: jax.Array, block_size: int, *, keep_past: bool = False
) -> jax.Array:
    """[B, S] slots of the rows that hold `positions`; see the public `slots_from_block_table`.

    With `keep_past` a position that has no row, and is not negative, gives INT32_MAX.
    """
    entries = block_table.shape[1]
    entry = positions // block_size
    known = (positions >= 0) & (entry < entries)
    if not isinstance(entries, int) or entries:
        last = jnp.maximum(_int32(entries) - 1, 0)
        blocks = jnp.take_along_axis(block_table, jnp.clip(entry, 0, last), axis=1)
    else:
        blocks = jnp.full_like(positions, -1)
    row = jnp.where(known, positions % block_size, _past_or_negative(positions))
    return rebase(row, blocks, block_size, keep_past=keep_past)


def rows_below(lengths: jax.Array, rows: Any) -> jax.Array:
    """[B, rows] bool: which rows of each sequence or block are its first `lengths` [B] ones."""
    return jnp.arange(rows, dtype=jnp.int32)[None, :] < lengths[:, None]


def rows_of_blocks(
    block_table: jax.Array, lengths: jax.Array, blocks: Any, block_size: int
) -> jax.Array:
    """[blocks] int32: how many rows of each block the sequences with these lengths have in use."""
    entry = jnp.arange(block_table.shape[1], dtype=jnp.int32)[None, :]
    full, rest = lengths[:, None] // block_size, lengths[:, None] % block_size
    rows = jnp.where(entry < full, block_size, jnp.where(entry == full, rest, 0))
    there = is_row(block_table, blocks)
    number = jnp.where(there, block_table, _int32(blocks))  # past the end, and dropped
    return jnp.zeros((blocks,), jnp.int32).at[number].max(rows, mode="drop")


def group_slots(slots: jax.Array, rows: Any) -> jax.Array:
    """[*g, T] slots of each group's `rows` rows as slots over the rows of all groups, or -1.

    A device without fusion launches a kernel for every operation, so there are as few as can be:
    a conversion, an unsigned comparison, a selection, and an addition where there are groups.
    """
    groups = slots.shape[:-1]
    number = math.prod(groups)
    if not all(isinstance(size, int) for size in (*slots.shape, rows)):
        return rebase(slots, _count(number).reshape(*groups, 1), rows)
    block = np.arange(number, dtype=np.int64).reshape(*groups, 1)
    fits = block < INT32_MAX // max(rows, 1)  # the rows of other blocks are more than int32 counts
    bound = _constant(np.where(fits, rows, 0), slots.shape, np.uint32)
    base = _constant(np.where(fits, block * rows, 0), slots.shape, np.int32)
    inside = lax.lt(lax.convert_element_type(slots, jnp.uint32), bound)
    moved = slots if number == 1 else lax.add(slots, base)
    return lax.select(inside, moved, _constant(np.asarray(-1), slots.shape, np.int32))


def _constant(value: np.ndarray, shape: Sequence[int], dtype: Any) -> np.ndarray:
    """A constant of a shape. JAX writes a view out as a broadcast, which is an operation."""
    view = np.broadcast_to(value.astype(dtype), shape)
    return view.copy() if view.size <= _LARGEST_CONSTANT else view


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
    """The mesh axes of an `axis_name` argument or a PartitionSpec's entry: None, one or several."""
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
    slots: jax.Array,
    row_dims: Sequence[Any],
    axes: Sequence[Axes],
    shards: Sequence[int],
    *,
    keep_past: bool = False,
) -> jax.Array:
    """Slots of the whole cache as slots of this device's shard, -1 for those of other shards.

    Args:
      slots: int32 slots over the whole cache's row dimensions.
      row_dims: the shard's row dimensions.
      axes: the mesh axes of each row dimension.
      shards: the number of shards of each row dimension.
      keep_past: whether a slot past the end of the whole cache becomes INT32_MAX.

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
    nowhere = jnp.full_like(local, -1)
    if keep_past:
        total = _int32(math.prod(row_dims) * math.prod(shards))
        nowhere = jnp.where(slots >= total, jnp.full_like(local, INT32_MAX), nowhere)
    return jnp.where(own, local, nowhere)
