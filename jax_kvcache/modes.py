"""The call of an operator in JAX's manual, explicit and automatic modes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AxisType, NamedSharding

from jax_kvcache import backends
from jax_kvcache._compat import (
    is_export,
    keep_sharding_of,
    nests_manual_axes,
    num_automatic_devices,
)
from jax_kvcache.mesh import Call, Sharding, axes_of, mesh_of
from jax_kvcache.ops.operands import table
from jax_kvcache.version import __version__

# Platforms whose XLA asks Python how to partition a custom call
_CUSTOM_PARTITIONING_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def _explicit(call: Call, sharding: Sharding, mesh, axes, shapes, *operands):
    """The call on a mesh whose `axes` are explicit: the operands' types say where they are.

    `shapes` are those of the results.
    """
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
        out_specs=sharding.result_specs(layout, shapes),
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
        shapes = [aval.shape for aval in ctx.avals_out]
        return functools.partial(_explicit, call, sharding, mesh, explicit, shapes)
    if num_devices > 1:
        return functools.partial(_automatic, call, sharding, ctx.avals_out)
    return call.run_positional


def reference_over_mesh(
    call: Call, sharding: Sharding, shapes: Sequence[Any], *operands: jax.Array
) -> Sequence[jax.Array]:
    """The reference's operations, to be differentiated, where the operands are.

    JAX cannot type them over explicit axes, where they are spread as the call is. Over automatic
    ones XLA's partitioner spreads them.

    Args:
      call: the call, which runs the reference on one device.
      sharding: how its operator is spread over a mesh.
      shapes: of the results.
      *operands: the call's operands.
    """
    mesh = mesh_of(map(jax.typeof, operands))
    if explicit := _axes_named(mesh, AxisType.Explicit):
        return _explicit(call, sharding, mesh, explicit, shapes, *operands)
    return call.run_positional(*operands)
