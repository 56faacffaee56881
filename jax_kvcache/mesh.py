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
    """The mesh axes of each of `rank` dimensions of a NamedSharding.

    Raises:
      ValueError: the array is unreduced, that is one of several terms of a sum.
    """
    spec = sharding.spec
    if unreduced := getattr(spec, "unreduced", None):
        raise ValueError(
            f"an operand is unreduced over {sorted(unreduced)}, {spec}: add it up first, with "
            "jax.sharding.reshard."
        )
    named = tuple(getattr(spec, "partitions", spec))  # JAX 0.10 forbids to unpack some specs
    return tuple(map(axes_named, (*named, *[None] * (rank - len(named)))))


def axes_of_caches(mesh: Any, ops: Any, num_q_heads: int) -> tuple[Axes, ...]:
    """The mesh axes of each dimension of both caches.

    Args:
      mesh: the mesh.
      ops: the operands of an operator, things with a shape and a NamedSharding.
      num_q_heads: Nq, which is sharded as Nkv is.

    Raises:
      ValueError: a layout in which a cache would have to move, or that does not cut it evenly.
    """
    k, v = ops.k_cache, ops.v_cache
    of_k, of_v = (axes_of(cache.sharding, len(cache.shape)) for cache in (k, v))
    sizes = list(zip(k.shape, v.shape, strict=True))
    # Where they have two sizes, vmap mapped one cache alone and the other's is 1.
    if any(a != b and m == n for a, b, (m, n) in zip(of_k, of_v, sizes, strict=True)):
        raise ValueError(
            f"`v_cache` must be sharded like `k_cache`, {k.sharding.spec}, got "
            f"{v.sharding.spec}. Place both caches with one sharding."
        )
    axes = tuple(b if m == 1 else a for a, b, (m, _) in zip(of_k, of_v, sizes, strict=True))
    if real_axes(mesh, axes[-1]):
        raise ValueError(
            "`k_cache` must not be sharded over its last dimension D, which is rotated and read as "
            f"a whole, got {k.sharding.spec}. Shard Nkv instead."
        )
    shards = num_shards(mesh, axes[-2])
    for name, number in (("Nkv", k.shape[-2]), ("Nq", num_q_heads)):
        if number % shards:
            raise ValueError(
                f"`k_cache` with its heads over {shards} devices needs {name} divisible by "
                f"{shards}, got {name} = {number}. Use fewer devices for the heads."
            )
    for own, (m, n) in zip(axes, sizes, strict=True):
        if (size := max(m, n)) % num_shards(mesh, own):
            raise ValueError(
                f"`k_cache` must be cut into equal parts, got a dimension of {size} over "
                f"{num_shards(mesh, own)} devices, {k.sharding.spec}. Make it larger, or use fewer "
                "devices for it."
            )
    return axes


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
