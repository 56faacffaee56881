"""The call over a mesh: the body of one shard, and JAX's manual, explicit and automatic modes."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AxisType, NamedSharding

import jax_kvcache
from jax_kvcache import _ffi
from jax_kvcache._compat import is_export, num_automatic_devices
from jax_kvcache._layout import (
    Axes,
    Layout,
    axes_of,
    layout_of,
    mesh_of,
    num_shards,
    operand_specs,
    own_slots,
    result_specs,
    sharding_rule,
)
from jax_kvcache._reference import Operands, write_rows

# Platforms whose XLA asks Python how to partition a custom call
_CUSTOM_PARTITIONING_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


# The body of one shard, under names for the mesh axes


def _own_heads(ops: Operands, axes: Axes, shards: int) -> Operands:
    """Cuts the columns of this device's q, k and v heads out of x, weight_scale and bias."""
    index = lax.axis_index(axes)
    kv_width = shards * math.prod(ops.k_cache.shape[-2:])
    q_width = ops.x.shape[-1] - 2 * kv_width

    def own(value):
        if value.shape == (0,):
            return value
        blocks = jnp.split(value, [q_width, q_width + kv_width], axis=-1)
        widths = [block.shape[-1] // shards for block in blocks]
        return jnp.concatenate(
            [
                lax.dynamic_slice_in_dim(block, index * width, width, axis=-1)
                for block, width in zip(blocks, widths, strict=True)
            ],
            axis=-1,
        )

    return ops._replace(x=own(ops.x), weight_scale=own(ops.weight_scale), bias=own(ops.bias))


def _travel(value, held: tuple[Axes, ...], wanted: tuple[Axes, ...], sizes):
    """Reshards the leading dimensions of a small array from `held` to `wanted`."""
    moves = [(dim, *m) for dim, m in enumerate(zip(held, wanted, strict=True)) if m[0] != m[1]]
    for dim, have, _ in moves:
        if have:
            value = lax.all_gather(value, have, axis=dim, tiled=True)
    for dim, _, want in moves:
        if want:
            size = value.shape[dim] // sizes(want)
            value = lax.dynamic_slice_in_dim(value, lax.axis_index(want) * size, size, axis=dim)
    return value


def _without_trivial_axes(layout: Layout, mesh) -> Layout:
    def real(axes):
        return tuple(axis for axis in axes if mesh.shape[axis] > 1)

    tokens, groups, rows = (tuple(map(real, dims)) for dims in layout[:3])
    return Layout(tokens, groups, rows, real(layout.heads))


def _shard(*operands, call, layout: Layout, mesh):
    """One device's part: its own heads of its own tokens, into the rows that are its own."""
    ops = Operands(*operands)
    sizes = functools.partial(num_shards, mesh)
    layout = _without_trivial_axes(layout, mesh)
    if layout.heads:
        ops = _own_heads(ops, layout.heads, sizes(layout.heads))
    row_dims = ops.k_cache.shape[len(layout.groups) : -2]
    here = functools.partial(
        own_slots, row_dims=row_dims, axes=layout.rows, sizes=[*map(sizes, layout.rows)]
    )
    wanted = (*layout.groups, ())  # every token of a group goes to every shard of its cache
    if layout.tokens == wanted:
        if any(layout.rows):
            return tuple(call(*ops._replace(slots=here(ops.slots)), indices_mode="drop"))
        return tuple(call(*ops))

    # The cache stays: the tokens' rows are quantised where the tokens are, and travel.
    T = ops.slots.shape[-1]
    landing = jnp.zeros((*ops.slots.shape, *ops.k_cache.shape[-2:]), jnp.int8)
    in_order = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), ops.slots.shape)
    q, k, v, k_rows, v_rows = call(*ops._replace(k_cache=landing, v_cache=landing, slots=in_order))
    slots, k_rows, v_rows = (
        _travel(a, layout.tokens, wanted, sizes) for a in (ops.slots, k_rows, v_rows)
    )
    write = functools.partial(write_rows, slots=here(slots), mode="drop")
    return q, k, v, write(ops.k_cache, rows=k_rows), write(ops.v_cache, rows=v_rows)


# JAX's modes


def _explicit(call, kv_output, mesh, axes, *operands):
    """The call on a mesh whose `axes` are explicit: the operands' types say where they are."""
    ops: Any = Operands(*map(jax.typeof, operands))
    layout = layout_of(mesh, ops)
    specs = operand_specs(layout, ops)
    placed = [
        jax.sharding.reshard(operand, NamedSharding(mesh, spec))
        for operand, spec in zip(operands, specs, strict=True)
    ]
    body = functools.partial(_shard, call=call, layout=layout, mesh=mesh)
    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=specs,
        out_specs=result_specs(layout, kv_output),
        axis_names=set(axes),
        check_vma=False,
    )(*placed)


def _automatic(call, kv_output, *operands):
    """The call under XLA's partitioner, which asks for one shard's body when it gets there.

    The body is no part of the program, so the program names it, for the compilation cache's key.
    """
    native = _ffi.unavailable("cpu") is None
    body_name = f"{jax_kvcache.__version__}, {call.keywords}, native={native}"

    def partition(mesh, ops, results):
        ops = Operands(*ops)
        layout = layout_of(mesh, ops, results[0].sharding)
        for name, operand, result in zip(
            ("k_cache", "v_cache"), ops[3:5], results[3:], strict=True
        ):
            if axes_of(operand.sharding, len(operand.shape)) != axes_of(
                result.sharding, len(result.shape)
            ):
                raise ValueError(
                    f"`{name}` must come out sharded as it goes in, {operand.sharding.spec}, got "
                    f"{result.sharding.spec}. Give it the same sharding in out_shardings."
                )
        body = functools.partial(_shard, call=call, layout=layout, mesh=mesh)
        return (
            mesh,
            body,
            tuple(NamedSharding(mesh, spec) for spec in result_specs(layout, kv_output)),
            tuple(NamedSharding(mesh, spec) for spec in operand_specs(layout, ops)),
        )

    partitioned = custom_partitioning(lambda *operands: tuple(call(*operands)))
    rule = sharding_rule(Operands(*map(jax.typeof, operands)), kv_output)
    partitioned.def_partition(partition, sharding_rule=rule)
    with set_xla_metadata(dequant_rope_quant_kvcache=body_name):
        return list(partitioned(*operands))


def _axes_named(mesh, axis_type):
    return [n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == axis_type]


def _check_automatic(ctx, num_devices):
    platforms = ctx.module_context.platforms
    where = f"dequant_rope_quant_kvcache over {num_devices} devices in automatic mode"
    fix = "Use explicit mesh axes (jax.sharding.AxisType.Explicit) or jax.shard_map."
    if strange := [p for p in platforms if p not in _CUSTOM_PARTITIONING_PLATFORMS]:
        raise NotImplementedError(
            f"{where} needs custom partitioning, which platform {' and '.join(strange)} does not "
            f"have. {fix}"
        )
    if is_export(ctx):
        raise NotImplementedError(
            f"{where} cannot be exported: its partitioning is a Python callback. {fix}"
        )


def partitioned(ctx, one_device, kv_output):
    """The call as the mesh wants it: partitioned, or within manual axes as it is.

    Args:
      ctx: the primitive's lowering context.
      one_device: the call of one device.
      kv_output: whether it returns k and v.

    Raises:
      NotImplementedError: automatic axes beside others, and automatic mode where it cannot be had.
    """
    mesh = mesh_of(ctx.avals_in)
    explicit, manual = (_axes_named(mesh, t) for t in (AxisType.Explicit, AxisType.Manual))
    automatic = [axis for axis in _axes_named(mesh, AxisType.Auto) if mesh.shape[axis] > 1]
    if (explicit or manual) and automatic:
        raise NotImplementedError(
            f"dequant_rope_quant_kvcache cannot mix automatic mesh axes {automatic} with manual or "
            f"explicit ones {manual + explicit}. Make them all manual (`axis_names` of "
            "jax.shard_map) or explicit."
        )
    if explicit:
        return functools.partial(_explicit, one_device, kv_output, mesh, explicit)
    num_devices = num_automatic_devices(ctx)
    if num_devices > 1:
        _check_automatic(ctx, num_devices)
        return functools.partial(_automatic, one_device, kv_output)
    return one_device
