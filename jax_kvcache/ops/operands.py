"""The tables that say what an operator's operands and results are, and what is read off them.

A table is a NamedTuple whose fields are annotated with an `Operand` or a `Result`, in the order in
which the primitive and its native targets take and return them. Dimensions are words:

  "*g"   the group dimensions, which vmap prepends; possibly none
  "*g'"  as many dimensions as "*g", each of size 1 (shared by all groups) or full
  "*r"   any other word with a star: one or more dimensions
  "T"    any other word: one dimension

An absent optional is an array of shape [0], so that every call has all operands and results.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jax_kvcache.ops.slots import Axes


@dataclasses.dataclass(frozen=True)
class Operand:
    """One operand.

    Attributes:
      dims: its dimensions, see the module's docstring.
      optional: whether it may be absent.
      cache: whether it is a cache, which stays on its devices and is never reshaped or copied.
      flat: whether it enters the native target in one dimension.
    """

    dims: str
    optional: bool = False
    cache: bool = False
    flat: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """One result.

    Attributes:
      dims: its dimensions, see the module's docstring.
      dtype_of: the operand that it has the dtype of; None is float32.
      reads: the operands that its values depend on; None for all.
      option: the field of the options that is true when it is wanted; None: always.
      aliases: the operand whose buffer it takes when that is donated.
      flat: whether it leaves the native target in one dimension.
    """

    dims: str
    dtype_of: str | None = None
    reads: tuple[str, ...] | None = None
    option: str | None = None
    aliases: str | None = None
    flat: bool = False


def table(fields: Any) -> dict[str, Any]:
    """The `Operand` or `Result` of each field of a table, in order."""
    return _read_table(fields)


@functools.cache
def _read_table(fields: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(fields, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


def absent() -> jax.Array:
    """What stands for an optional operand that is not given."""
    return jnp.zeros((0,), jnp.float32)


def is_absent(array: Any) -> bool:
    """Whether an operand or result of a call is an optional that is not there."""
    return tuple(array.shape) == (0,)


def group_rank_of(operands: Any) -> int:
    """How many group dimensions a call has: the first operand decides."""
    first = next(iter(table(type(operands)).values()))
    return len(operands[0].shape) - (len(first.dims.split()) - 1)


def match(dims: str, items: Sequence[Any], group_rank: int) -> list[tuple[str, tuple[Any, ...]]]:
    """Pairs each word of `dims` with its part of `items`: sizes, mesh axes, anything per dimension.

    At most one word with a star may have any number of dimensions.
    """
    words = dims.split()
    counts = [group_rank if word in ("*g", "*g'") else 1 for word in words]
    for i, word in enumerate(words):
        if word.startswith("*") and word not in ("*g", "*g'"):
            counts[i] = len(items) - (sum(counts) - 1)
    parts, start = [], 0
    for word, count in zip(words, counts, strict=True):
        parts.append((word, tuple(items[start : start + count])))
        start += count
    return parts


def sizes_of(operands: Any) -> dict[str, tuple[Any, ...]]:
    """The sizes of every word, from the operands' shapes; operands that come first decide."""
    sizes: dict[str, tuple[Any, ...]] = {}
    rank = group_rank_of(operands)
    for operand, value in zip(table(type(operands)).values(), operands, strict=True):
        if not is_absent(value):
            for word, dims in match(operand.dims, value.shape, rank):
                sizes.setdefault(word, dims)
    return sizes


def shape_of(dims: str, sizes: dict[str, tuple[Any, ...]]) -> tuple[Any, ...]:
    """The shape of a result with these dimensions."""
    return tuple(size for word in dims.split() for size in sizes[word])


def aliases(operands: type, results: type) -> dict[int, int]:
    """The positions operand -> result, for results that take an operand's buffer."""
    names = list(table(operands))
    return {
        names.index(result.aliases): i
        for i, result in enumerate(table(results).values())
        if result.aliases is not None
    }


def flattened(operands: Any) -> Any:
    """The operands with those that enter the native target in one dimension reshaped to it."""
    rows = table(type(operands))
    return operands._replace(
        **{name: getattr(operands, name).reshape(-1) for name, row in rows.items() if row.flat}
    )


def flat_shape(shape: Iterable[Any]) -> tuple[Any]:
    """The shape of the same elements in one dimension."""
    return (math.prod(shape),)


def varying_alike(operands: Any, results: type, varying: dict[str, frozenset[str]]) -> list[Axes]:
    """Under shard_map: the mesh axes over which each operand has to be made varying.

    A result varies over the axes of the operands that it reads, and no further: q of tokens that
    every device has is known to be the same everywhere, also where each device writes its own part
    of the cache.

    Args:
      operands: the call's operands.
      results: the table of its results.
      varying: the axes over which each operand varies.

    Returns:
      For each operand the axes to add, sorted.
    """
    readers = [result.reads or tuple(varying) for result in table(results).values()]
    readers.sort(key=len)
    wanted = {}
    for name in operands._fields:
        reads = next(reads for reads in readers if name in reads)
        wanted[name] = frozenset().union(*(varying[read] for read in reads))
    return [tuple(sorted(wanted[name] - varying[name])) for name in operands._fields]


def with_leading_group(
    operands: Any, dims: Sequence[int | None], broadcast: Callable[[jax.Array], jax.Array]
) -> Any:
    """The operands with a mapped axis as one more group dimension, for vmap.

    Args:
      operands: the call's operands.
      dims: for each the axis that is mapped, or None.
      broadcast: adds the leading dimension to an unmapped operand that every group has in full.
    """

    def lead(row: Operand, value: jax.Array, dim: int | None) -> jax.Array:
        if dim is not None:
            return value if dim == 0 else jnp.moveaxis(value, dim, 0)
        if is_absent(value):
            return value
        return jnp.expand_dims(value, 0) if row.dims.startswith("*g'") else broadcast(value)

    rows = table(type(operands)).values()
    return type(operands)(*map(lead, rows, operands, dims))


def partition_spec(
    dims: str, shape: Sequence[Any], group_rank: int, axes: dict[str, tuple[Axes, ...]]
) -> PartitionSpec:
    """The PartitionSpec of an operand or result.

    Args:
      dims: its dimensions.
      shape: its shape; [0] for an absent one.
      group_rank: how many group dimensions the call has.
      axes: the mesh axes of each dimension of a word; a word that is not there is not sharded.
    """
    if tuple(shape) == (0,):
        return PartitionSpec(None)
    entries: list[Any] = []
    for word, sizes in match(dims, shape, group_rank):
        own = axes.get(word.rstrip("'"), ((),) * len(sizes))
        shared = word == "*g'"
        entries += [
            () if shared and size == 1 else where for size, where in zip(sizes, own, strict=True)
        ]
    return PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in entries))
