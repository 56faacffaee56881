"""How the operator is spread over a mesh: tokens, groups, rows and heads, and one shard's part.

Tokens and caches may be sharded differently: the tokens' work is done where the tokens are, and the
rows are written where the cache is. A cache never moves.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jax_kvcache.mesh import (
    Call,
    Sharding,
    axes_of,
    axes_of_caches,
    move,
    num_shards,
    own_part,
    real_axes,
)
from jax_kvcache.ops.dequant_rope_quant_kvcache.reference import Operands, Results, write_rows
from jax_kvcache.ops.operands import is_absent, partition_spec, table
from jax_kvcache.ops.slots import Axes, shard_slots


class Layout(NamedTuple):
    """The mesh axes of each dimension of a call."""

    tokens: tuple[Axes, ...]  # *g, T of x, cos, sin, slots and of q, k, v
    groups: tuple[Axes, ...]  # *g of the caches
    rows: tuple[Axes, ...]  # *r of the caches
    heads: Axes  # Nkv of the caches, and the heads of q, k, v

    def spec(self, dims: str, shape: Any, cache: bool) -> PartitionSpec:
        """The PartitionSpec of an operand or result; x is whole along H."""
        heads = (self.heads,)
        axes = {"*g": self.tokens[:-1], "T": self.tokens[-1:], "Nq": heads, "Nkv": heads}
        if cache:
            axes |= {"*g": self.groups, "*r": self.rows}
        return partition_spec(dims, shape, len(self.groups), axes)


def layout_of(mesh: Any, ops: Any, results: Any, options: Any) -> Layout:
    """The layout that the operands' shardings ask for; see `mesh.Sharding`.

    Where the tokens are not sharded, the sharding that is wanted of q decides.
    """
    del options
    group_rank = len(ops.slots.shape) - 1
    num_kv_heads, head_size = ops.k_cache.shape[-2:]
    num_q_heads = ops.x.shape[-1] // head_size - 2 * num_kv_heads
    *rest, heads, _ = axes_of_caches(mesh, ops, num_q_heads)
    tokens = axes_of(ops.x.sharding, len(ops.x.shape))[:-1]
    if results is not None and not any(tokens):
        tokens = axes_of(results[0].sharding, len(tokens) + 2)[:-2]
    tokens = tuple(tuple(a for a in axes if a not in heads) for axes in tokens)
    # What XLA adds to make parts equal is no token: it would be written.
    tokens = tuple(
        axes if size % num_shards(mesh, axes) == 0 else ()
        for size, axes in zip(ops.x.shape[:-1], tokens, strict=True)
    )
    return Layout(tokens, tuple(rest[:group_rank]), tuple(rest[group_rank:]), heads)


def operand_specs(layout: Layout, ops: Any) -> tuple[PartitionSpec, ...]:
    """The PartitionSpec of every operand of one shard."""
    rows = table(Operands).values()
    return tuple(
        layout.spec(row.dims, operand.shape, row.cache)
        for row, operand in zip(rows, ops, strict=True)
    )


def result_specs(layout: Layout, shapes: Any) -> tuple[PartitionSpec, ...]:
    """The PartitionSpec of every result: tokens as in x, heads as in the cache."""
    rows = table(Results).values()
    return tuple(
        layout.spec(row.dims, shape, row.aliases is not None)
        for row, shape in zip(rows, shapes, strict=True)
    )


def rule(ops: Any, results: Any, options: Any) -> tuple[str, dict[str, int]]:
    """Shardy's rule: tokens propagate between x, q, k and v, and the caches into themselves.

    Nothing else is shared: a cache must not take its sharding from the tokens, nor, through q,
    from what comes after.
    """
    del options
    tokens = [f"g{i}" for i in range(len(ops.slots.shape) - 1)] + ["t"]
    rest = (f"u{i}" for i in itertools.count())
    cache: list[str] = []

    def factors(row, array, is_cache):
        if is_cache:
            cache.extend(next(rest) for _ in array.shape[len(cache) :])
            return cache
        shared = tokens if row.dims.startswith("*g T") and not is_absent(array) else []
        return [*shared, *(next(rest) for _ in array.shape[len(shared) :])]

    operands = [
        factors(row, a, row.cache) for row, a in zip(table(Operands).values(), ops, strict=True)
    ]
    outputs = [
        factors(row, a, row.aliases is not None)
        for row, a in zip(table(Results).values(), results, strict=True)
    ]
    sides = (operands, outputs)
    return " -> ".join(", ".join(map(" ".join, side)) for side in sides), {}


def _own_heads(ops: Operands, axes: Axes, shards: int) -> Operands:
    """Cuts the columns of this device's q, k and v heads out of what has H columns."""
    kv_width = shards * math.prod(ops.k_cache.shape[-2:])
    q_width = ops.x.shape[-1] - 2 * kv_width

    def own(value: jax.Array) -> jax.Array:
        parts = jnp.split(value, [q_width, q_width + kv_width], axis=-1)
        return jnp.concatenate([own_part(part, axes, shards, -1) for part in parts], axis=-1)

    return ops._replace(
        **{
            name: own(getattr(ops, name))
            for name, row in table(Operands).items()
            if row.dims.endswith(" H") and not is_absent(getattr(ops, name))
        }
    )


def _shard(ops: Operands, call: Call, layout: Layout, mesh: Any) -> Any:
    """One device's part: its own heads of its own tokens, into the rows that are its own."""
    shards = functools.partial(num_shards, mesh)
    real = functools.partial(real_axes, mesh)
    tokens, groups, rows = (tuple(map(real, dims)) for dims in layout[:3])
    heads = real(layout.heads)
    if heads:
        ops = _own_heads(ops, heads, shards(heads))
    here = functools.partial(
        shard_slots,
        row_dims=ops.k_cache.shape[len(groups) : -2],
        axes=rows,
        shards=[*map(shards, rows)],
    )
    wanted = (*groups, ())  # every token of a group goes to every shard of its cache
    if tokens == wanted:
        if any(rows):
            return call.run(ops._replace(slots=here(ops.slots)), indices_mode="drop")
        return call.run(ops)

    # The cache stays: the tokens' rows are quantised where the tokens are, and travel.
    T = ops.slots.shape[-1]
    landing = jnp.zeros((*ops.slots.shape, *ops.k_cache.shape[-2:]), jnp.int8)
    in_order = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), ops.slots.shape)
    q, k, v, k_rows, v_rows = call.run(
        ops._replace(k_cache=landing, v_cache=landing, slots=in_order)
    )
    slots, k_rows, v_rows = (move(a, tokens, wanted, shards) for a in (ops.slots, k_rows, v_rows))
    write = functools.partial(write_rows, slots=here(slots), mode="drop")
    return q, k, v, write(ops.k_cache, rows=k_rows), write(ops.v_cache, rows=v_rows)


SHARDING = Sharding(layout_of, operand_specs, result_specs, rule, _shard)
