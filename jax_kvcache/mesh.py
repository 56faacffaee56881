"""What any operator needs to know of a mesh: axes, shards, and how its call is spread over one."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import PartitionSpec

from jax_kvcache.ops.indexing import take_one
from jax_kvcache.ops.slots import Axes, axes_named


def mesh_of(types: Iterable[Any]) -> Any:
    """The mesh that the types name; an empty one if they name none."""
    meshes = [t.sharding.mesh for t in types]
    return next((mesh for mesh in meshes if not mesh.empty), meshes[0])


def axes_of(sharding: Any, rank: int) -> tuple[Axes, ...]:
    """The mesh axes of each of `rank` dimensions of a NamedSharding."""
    spec = (*sharding.spec, *[None] * (rank - len(sharding.spec)))
    return tuple(map(axes_named, spec))


def num_shards(mesh: Any, axes: Axes) -> int:
    """How many parts the mesh axes cut a dimension into."""
    return math.prod(mesh.shape[axis] for axis in axes)


def real_axes(mesh: Any, axes: Axes) -> Axes:
    """The axes that have more than one device."""
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def move(
    value: jax.Array, held: Sequence[Axes], wanted: Sequence[Axes], shards: Callable[[Axes], int]
) -> jax.Array:
    """Inside one shard's body: reshards the leading dimensions of a small array.

    Args:
      value: this device's part.
      held: the mesh axes of its leading dimensions.
      wanted: the mesh axes that they are to have.
      shards: the number of parts that some axes make.
    """
    moves = [(dim, *m) for dim, m in enumerate(zip(held, wanted, strict=True)) if m[0] != m[1]]
    for dim, have, _ in moves:
        if have:
            value = lax.all_gather(value, have, axis=dim, tiled=True)
    for dim, _, want in moves:
        if want:
            value = own_part(value, want, shards(want), dim)
    return value


def own_part(value: jax.Array, axes: Axes, shards: int, dim: int) -> jax.Array:
    """Inside one shard's body: this device's part of one dimension of a whole array."""
    dim %= value.ndim
    size = value.shape[dim] // shards
    parts = value.reshape(*value.shape[:dim], shards, size, *value.shape[dim + 1 :])
    return take_one(parts, lax.axis_index(axes), dim)


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How an operator is spread over a mesh. A layout is whatever these functions agree on.

    Attributes:
      layout: (mesh, operands, results, options) -> the layout that the shardings ask for. Operands
        are things with a shape, a dtype and a NamedSharding; results are such things too, where XLA
        says what it wants of them, else None. Raises ValueError for a layout that would need a
        cache to move.
      operand_specs: (layout, operands) -> the PartitionSpec of every operand of one shard.
      result_specs: (layout, shapes) -> the PartitionSpec of every result.
      rule: (operands, results, options) -> Shardy's rule, of things with a shape, and the sizes of
        the factors that it multiplies.
      shard: (operands, call, layout, mesh) -> the results of one shard, by `call.run`.
      settled: operands whose sharding is decided by what computes them. In automatic mode Shardy
        propagates it from there to the results, and never from this call back to the operand.
      plain_is_fine: whether, where custom partitioning cannot be had, the reference's operations
        are emitted for XLA's own partitioner to spread; otherwise such a call is an error.
    """

    layout: Callable[[Any, Any, Any, Any], Any]
    operand_specs: Callable[[Any, Any], tuple[PartitionSpec, ...]]
    result_specs: Callable[[Any, Sequence[Any]], tuple[PartitionSpec, ...]]
    rule: Callable[[Any, Sequence[Any], Any], tuple[str, dict[str, int]]]
    shard: Callable[[Any, "Call", Any, Any], Sequence[jax.Array]]
    settled: tuple[str, ...] = ()
    plain_is_fine: bool = False


class Call(NamedTuple):
    """One call of an operator, while it is lowered."""

    name: str
    operands: type
    results: type
    on_one_device: Callable[..., Sequence[jax.Array]]
    plain: Callable[..., Sequence[jax.Array]]
    options: Any

    def run(self, operands: Any, **changes: Any) -> Sequence[jax.Array]:
        """The call of one device, with some options changed."""
        options = dataclasses.replace(self.options, **changes)
        return self.on_one_device(*operands, options=options)

    def run_positional(self, *operands: jax.Array) -> Sequence[jax.Array]:
        """The call of one device."""
        return self.on_one_device(*operands, options=self.options)
