"""Where a call's tokens, groups, rows and heads lie on a mesh, and the PartitionSpecs of that."""

import itertools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jax_kvcache._reference import Operands

Axes = tuple[str, ...]  # the mesh axes of one dimension, major first; empty: not sharded

# Operands with the group dimensions in full; the others are parameters that groups may share.
PER_GROUP = ("x", "cos", "sin", "k_cache", "v_cache", "slots", "activation_scale")


class Layout(NamedTuple):
    """The mesh axes of each dimension of a call.

    Tokens and caches may be sharded differently: the tokens' work is done where the tokens are,
    and the rows are written where the cache is.
    """

    tokens: tuple[Axes, ...]  # *g, T of x, cos, sin, slots and of q, k, v
    groups: tuple[Axes, ...]  # *g of the caches
    rows: tuple[Axes, ...]  # *r of the caches
    heads: Axes  # Nkv of the caches, and the heads of q, k, v


def mesh_of(types):
    """The mesh that the types name; an empty one if they name none."""
    meshes = [t.sharding.mesh for t in types]
    return next((mesh for mesh in meshes if not mesh.empty), meshes[0])


def axes_of(sharding, rank) -> tuple[Axes, ...]:
    """The mesh axes of each of `rank` dimensions of a NamedSharding."""

    def axes(entry):
        return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)

    spec = (*sharding.spec, *[None] * (rank - len(sharding.spec)))
    return tuple(map(axes, spec))


def _entry(axes: Axes):
    return axes[0] if len(axes) == 1 else axes or None


def num_shards(mesh, axes: Axes) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def layout_of(mesh, ops: Any, q_sharding=None) -> Layout:
    """The layout that the operands' shardings ask for.

    Args:
      mesh: the mesh that the shardings name.
      ops: `Operands` of things with a shape and a NamedSharding.
      q_sharding: where q is wanted; decides for tokens that are not sharded.

    Raises:
      ValueError: a layout that would need a cache to move or to be cut through its heads.
    """
    group_rank = len(ops.slots.shape) - 1
    cache, v_cache = (axes_of(c.sharding, len(c.shape)) for c in (ops.k_cache, ops.v_cache))
    if cache != v_cache:
        raise ValueError(
            f"`v_cache` must be sharded like `k_cache`, {ops.k_cache.sharding.spec}, got "
            f"{ops.v_cache.sharding.spec}. Place both caches with one sharding."
        )
    *rest, heads, head_dim = cache
    if head_dim:
        raise ValueError(
            f"`k_cache` must not be sharded over its last dimension D, which RoPE rotates as a "
            f"whole, got {ops.k_cache.sharding.spec}. Shard Nkv instead."
        )
    num_kv_heads, head_size = ops.k_cache.shape[-2:]
    num_q_heads = ops.x.shape[-1] // head_size - 2 * num_kv_heads
    shards = num_shards(mesh, heads)
    for name, number in (("Nkv", num_kv_heads), ("Nq", num_q_heads)):
        if number % shards:
            raise ValueError(
                f"`k_cache` with its heads over {shards} devices needs {name} divisible by "
                f"{shards}, got {name} = {number}. Use fewer devices for the heads."
            )
    tokens = axes_of(ops.x.sharding, len(ops.x.shape))[:-1]
    if q_sharding is not None and not any(tokens):
        tokens = axes_of(q_sharding, len(tokens) + 2)[:-2]
    tokens = tuple(tuple(a for a in axes if a not in heads) for axes in tokens)
    return Layout(tokens, tuple(rest[:group_rank]), tuple(rest[group_rank:]), heads)


def operand_specs(layout: Layout, ops: Any) -> tuple[PartitionSpec, ...]:
    """The PartitionSpec of every operand of one shard; x is whole along H."""
    tokens, heads = [*map(_entry, layout.tokens)], _entry(layout.heads)
    cache = PartitionSpec(*map(_entry, layout.groups + layout.rows), heads, None)

    def spec(name, operand):
        if name in ("k_cache", "v_cache"):
            return cache
        if operand.shape == (0,):
            return PartitionSpec(None)
        if name in PER_GROUP:
            return PartitionSpec(*tokens, *[None] * (len(operand.shape) - len(tokens)))
        trailing = (None,) if name in ("weight_scale", "bias") else (heads, None)
        groups = (
            None if size == 1 else axes for size, axes in zip(operand.shape, tokens, strict=False)
        )
        return PartitionSpec(*list(groups)[: len(operand.shape) - len(trailing)], *trailing)

    return tuple(map(spec, Operands._fields, ops))


def result_specs(layout: Layout, kv_output: bool) -> tuple[PartitionSpec, ...]:
    """The PartitionSpec of every result: tokens as in x, heads as in the cache."""
    heads = _entry(layout.heads)
    rows = PartitionSpec(*map(_entry, layout.tokens), heads, None)
    kv = rows if kv_output else PartitionSpec(None)
    cache = PartitionSpec(*map(_entry, layout.groups + layout.rows), heads, None)
    return rows, kv, kv, cache, cache


def sharding_rule(ops: Any, kv_output: bool) -> str:
    """Shardy's rule: tokens propagate between x, q, k and v, and the caches into themselves.

    Nothing else is shared: a cache must not take its sharding from the tokens, nor, through q,
    from what comes after.
    """
    tokens = [f"g{i}" for i in range(len(ops.slots.shape) - 1)] + ["t"]
    rest = (f"u{i}" for i in itertools.count())

    def factors(shape, shared=()):
        return [*shared, *(next(rest) for _ in shape[len(shared) :])]

    caches = [factors(ops.k_cache.shape)] * 2
    operands = {
        name: factors(a.shape, tokens if name in PER_GROUP and a.shape != (0,) else ())
        for name, a in ops._asdict().items()
    } | dict(zip(("k_cache", "v_cache"), caches, strict=True))
    q_shape = (*ops.slots.shape, 0, 0)
    kv = [factors(q_shape, tokens) if kv_output else factors((0,)) for _ in "kv"]
    results = [factors(q_shape, tokens), *kv, *caches]
    text = [", ".join(map(" ".join, side)) for side in (operands.values(), results)]
    return " -> ".join(text)


def own_slots(slots, row_dims, axes, sizes):
    """Slots of the whole cache as slots of this device's shard, -1 for those of other shards.

    Args:
      slots: int32, flat row numbers over the whole cache's row dimensions.
      row_dims: the shard's row dimensions.
      axes: the mesh axes of each row dimension.
      sizes: the number of shards of each row dimension.

    Returns:
      int32, flat row numbers over `row_dims`, or -1.
    """
    valid, rest = slots >= 0, slots
    own, stride = jnp.zeros_like(slots), jnp.int32(1)
    for i in reversed(range(len(row_dims))):
        size = jnp.asarray(row_dims[i], jnp.int32)
        # the major dimension keeps what is past the end, and loses it below
        coordinate = rest % (size * sizes[i]) if i else rest
        rest = rest // (size * sizes[i])
        if axes[i]:
            coordinate = coordinate - lax.axis_index(axes[i]) * size
        valid = valid & (coordinate >= 0) & (coordinate < size)
        own, stride = own + coordinate * stride, stride * size
    return jnp.where(valid, own, jnp.full_like(own, -1))
