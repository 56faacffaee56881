"""What any operator needs to know of a mesh, and JAX's manual, explicit and automatic modes."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_kvcache import backends
from jax_kvcache._compat import (
    is_export,
    keep_sharding_of,
    nests_manual_axes,
    num_automatic_devices,
)
from jax_kvcache.ops.indexing import take_one
from jax_kvcache.ops.operands import Axes, table
from jax_kvcache.version import __version__

# Platforms whose XLA asks Python how to partition a custom call
_CUSTOM_PARTITIONING_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def mesh_of(types: Iterable[Any]) -> Any:
    """The mesh that the types name; an empty one if they name none."""
    meshes = [t.sharding.mesh for t in types]
    return next((mesh for mesh in meshes if not mesh.empty), meshes[0])


def axes_of(sharding: Any, rank: int) -> tuple[Axes, ...]:
    """The mesh axes of each of `rank` dimensions of a NamedSharding."""

    def axes(entry):
        return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)

    spec = (*sharding.spec, *[None] * (rank - len(sharding.spec)))
    return tuple(map(axes, spec))


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
      settled: operands that have their sharding from what comes before alone: the rule says what
        follows from it, and nothing that follows changes it.
      plain_is_fine: whether the reference's operations do, left to XLA's own partitioner, where
        there is no custom partitioning; otherwise that is an error.
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


def _explicit(call: Call, sharding: Sharding, mesh, axes, avals_out, *operands):
    """The call on a mesh whose `axes` are explicit: the operands' types say where they are."""
    ops: Any = call.operands(*map(jax.typeof, operands))
    layout = sharding.layout(mesh, ops, None, call.options)
    specs = sharding.operand_specs(layout, ops)
    placed = [
        jax.sharding.reshard(operand, NamedSharding(mesh, spec))
        for operand, spec in zip(operands, specs, strict=True)
    ]

    def body(*operands):
        return tuple(sharding.shard(call.operands(*operands), call, layout, mesh))

    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=specs,
        out_specs=sharding.result_specs(layout, [a.shape for a in avals_out]),
        axis_names=set(axes),
        check_vma=False,
    )(*placed)


def _automatic(call: Call, sharding: Sharding, avals_out, *operands):
    """The call under XLA's partitioner, which asks for one shard's body when it gets there.

    The body is no part of the program, so the program names it, for the compilation cache's key.
    """
    native = backends.unavailable("cpu", call.name) is None
    body_name = f"{__version__}, {call.options}, native={native}"

    def partition(mesh, ops, results):
        ops = call.operands(*ops)
        layout = sharding.layout(mesh, ops, results, call.options)
        for row, result in zip(table(call.results).values(), results, strict=True):
            if row.aliases is None:
                continue
            operand = getattr(ops, row.aliases)
            rank = len(operand.shape)
            if axes_of(operand.sharding, rank) != axes_of(result.sharding, rank):
                raise ValueError(
                    f"`{row.aliases}` must come out sharded as it goes in, "
                    f"{operand.sharding.spec}, got {result.sharding.spec}. Give it the same "
                    "sharding in out_shardings."
                )

        def body(*operands):
            return tuple(sharding.shard(call.operands(*operands), call, layout, mesh))

        result_specs = sharding.result_specs(layout, [r.shape for r in results])
        return (
            mesh,
            body,
            tuple(NamedSharding(mesh, spec) for spec in result_specs),
            tuple(NamedSharding(mesh, spec) for spec in sharding.operand_specs(layout, ops)),
        )

    partitioned = custom_partitioning(lambda *operands: tuple(call.run_positional(*operands)))
    types: Any = call.operands(*map(jax.typeof, operands))
    rule, sizes = sharding.rule(types, avals_out, call.options)
    partitioned.def_partition(partition, sharding_rule=rule, **sizes)
    ops = call.operands(*operands)
    settled = {name: keep_sharding_of(getattr(ops, name)) for name in sharding.settled}
    with set_xla_metadata(**{call.name: body_name}):
        return list(partitioned(*ops._replace(**settled)))


def _axes_named(mesh, axis_type):
    return [n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == axis_type]


def no_partitioning(name: str, mesh: Any, num_devices: int, platforms: Any, export: bool):
    """Why a call cannot be partitioned over automatic mesh axes, or None when it can.

    Args:
      name: the operator's name.
      mesh: the mesh that the operands' types name.
      num_devices: how many devices XLA's partitioner spreads the program over.
      platforms: those that it is lowered for.
      export: whether it is being exported.
    """
    explicit, manual = (_axes_named(mesh, t) for t in (AxisType.Explicit, AxisType.Manual))
    automatic = [axis for axis in _axes_named(mesh, AxisType.Auto) if mesh.shape[axis] > 1]
    if (explicit or manual) and automatic:
        return (
            f"{name} cannot mix automatic mesh axes {automatic} with manual or "
            f"explicit ones {manual + explicit}. Make them all manual (`axis_names` of "
            "jax.shard_map) or explicit."
        )
    if explicit and manual and not nests_manual_axes():
        return (
            f"{name} cannot have explicit mesh axes {explicit} beside manual ones {manual} with "
            f"JAX {jax.__version__}. Make them all manual (`axis_names` of jax.shard_map), or use "
            "JAX 0.10 or newer."
        )
    if explicit or num_devices == 1:
        return None
    where = f"{name} over {num_devices} devices in automatic mode"
    fix = "Use explicit mesh axes (jax.sharding.AxisType.Explicit) or jax.shard_map."
    if strange := [p for p in platforms if p not in _CUSTOM_PARTITIONING_PLATFORMS]:
        return (
            f"{where} needs custom partitioning, which platform {' and '.join(strange)} does not "
            f"have. {fix}"
        )
    if export:
        return f"{where} cannot be exported: its partitioning is a Python callback. {fix}"
    return None


def partitioned(ctx: Any, call: Call, sharding: Sharding) -> Callable[..., Sequence[jax.Array]]:
    """The call as the mesh wants it: partitioned, or within manual axes as it is.

    Args:
      ctx: the primitive's lowering context.
      call: the call.
      sharding: how its operator is spread over a mesh.

    Raises:
      NotImplementedError: automatic axes beside others, and automatic mode where it cannot be had.
    """
    mesh = mesh_of(ctx.avals_in)
    num_devices = num_automatic_devices(ctx)
    platforms = ctx.module_context.platforms
    reason = no_partitioning(call.name, mesh, num_devices, platforms, is_export(ctx))
    if reason is not None:
        if sharding.plain_is_fine and call.options.implementation != "ffi":
            return call.plain
        raise NotImplementedError(reason)
    if explicit := _axes_named(mesh, AxisType.Explicit):
        return functools.partial(_explicit, call, sharding, mesh, explicit, ctx.avals_out)
    if num_devices > 1:
        return functools.partial(_automatic, call, sharding, ctx.avals_out)
    return call.run_positional
