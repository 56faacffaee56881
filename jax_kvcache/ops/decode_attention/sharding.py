"""How the operator is spread over a mesh: it is computed where the cache is, which never moves.

Sequences, steps and heads are shards of their own and need nothing of each other. Blocks and rows
that are sharded make every device compute its part of the softmax, which is then merged.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jax_kvcache.mesh import Call, Sharding, axes_of, axes_of_caches, num_shards, real_axes
from jax_kvcache.ops.decode_attention.merge import merge_over_axes
from jax_kvcache.ops.decode_attention.reference import Operands, Results
from jax_kvcache.ops.operands import absent, is_absent, match, partition_spec, table
from jax_kvcache.ops.slots import Axes, shard_positions, shard_slots


class Layout(NamedTuple):
    """The mesh axes of each dimension of a call."""

    queries: tuple[Axes, ...]  # *g, B, S of q, positions, out, lse
    blocks: tuple[Axes, ...]  # *n of the caches
    rows: Axes  # R of the caches
    heads: Axes  # Nkv of the caches, and the heads of q, out, lse
    aligned: bool  # whether block b of the last block dimension is where sequence b is

    @property
    def merged(self) -> Axes:
        """The axes whose devices each have a part of a sequence's rows."""
        blocks = self.blocks[:-1] if self.aligned else self.blocks
        return (*itertools.chain(*blocks), *self.rows)

    def spec(self, dims: str, shape: Any) -> PartitionSpec:
        """The PartitionSpec of an operand or result."""
        *groups, batch, steps = self.queries
        heads = (self.heads,)
        axes = {"*g": tuple(groups), "B": (batch,), "S": (steps,), "Nq": heads, "Nkv": heads}
        axes |= {"*n": self.blocks, "R": (self.rows,)}
        return partition_spec(dims, shape, len(groups), axes)


def layout_of(mesh: Any, ops: Any, results: Any, options: Any) -> Layout:
    """The layout that the operands' shardings ask for; see `mesh.Sharding`."""
    del results  # the cache decides
    group_rank = len(ops.table.shape) - 2
    *lead, rows, heads, _ = axes_of_caches(mesh, ops, ops.q.shape[-2])
    groups, blocks = tuple(lead[:group_rank]), tuple(lead[group_rank:])
    own_groups, (batch, steps) = (
        axes_of(ops.q.sharding, len(ops.q.shape))[part]
        for part in (slice(group_rank), slice(group_rank, group_rank + 2))
    )
    if real_axes(mesh, rows) and options.window and ops.table.shape[-1] != 1:
        raise ValueError(
            "`window` needs whole blocks on every device, got `k_cache` with the rows of its "
            f"blocks sharded, {ops.k_cache.sharding.spec}. Shard the blocks instead."
        )
    # A contiguous cache has one block per sequence, and computes each sequence where its block is.
    same = options.contiguous and ops.k_cache.shape[-4] == ops.q.shape[-4]
    aligned = same and bool(blocks[-1])
    if aligned:
        batch = blocks[-1]
    taken = {*itertools.chain(*groups, *blocks, rows, heads)}

    def free(axes: Axes) -> Axes:
        return tuple(axis for axis in axes if axis not in taken)

    queries = [cached or free(own) for cached, own in zip(groups, own_groups, strict=True)]
    queries += [batch if aligned else free(batch), free(steps)]
    return Layout(tuple(queries), blocks, rows, heads, aligned)


def operand_specs(layout: Layout, ops: Any) -> tuple[PartitionSpec, ...]:
    """The PartitionSpec of every operand of one shard."""
    rows = table(Operands).values()
    return tuple(
        layout.spec(row.dims, operand.shape) for row, operand in zip(rows, ops, strict=True)
    )


def result_specs(layout: Layout, shapes: Any) -> tuple[PartitionSpec, ...]:
    """The PartitionSpec of every result: where the queries are computed."""
    rows = table(Results).values()
    return tuple(layout.spec(row.dims, shape) for row, shape in zip(rows, shapes, strict=True))


def rule(ops: Any, results: Any, options: Any) -> tuple[str, dict[str, int]]:
    """Shardy's rule: q and the results are where the cache is; see `mesh.Sharding`.

    Heads propagate from the caches to q and the results, and so do the sequences of contiguous
    caches; groups and steps propagate between q and the results. Nothing of it reaches a cache:
    what comes after must not decide where a cache lies (`mesh.Sharding.settled`). One kv head is
    on every device, and so are all heads of q: they propagate nothing.
    """
    group_rank = len(ops.table.shape) - 2
    rest = (f"u{i}" for i in itertools.count())
    kv_heads = ops.k_cache.shape[-2]
    per_kv_head = ops.q.shape[-2] // kv_heads
    # Shardy refuses a product of factors one of which is 1.
    q_heads = "(h j)" if per_kv_head > 1 else "h"
    groups = [f"g{i}" for i in range(group_rank)]
    shared = {"*g": groups, "B": ["b"], "S": ["s"]} | ({"Nq": [q_heads]} if kv_heads > 1 else {})
    aligned = options.contiguous and ops.k_cache.shape[-4] == ops.q.shape[-4]
    cache = [next(rest) for _ in ops.k_cache.shape[:-4]]
    cache += ["b" if aligned else next(rest), next(rest), "h", next(rest)]

    def factors(row: Any, array: Any) -> list[str]:
        if is_absent(array):
            return [next(rest)]
        if getattr(row, "cache", False):
            return cache
        parts = match(row.dims, array.shape, group_rank)
        own = ((shared.get(word), sizes) for word, sizes in parts)
        return [f for names, sizes in own for f in (names or [next(rest) for _ in sizes])]

    sides = (
        [factors(row, a) for row, a in zip(table(rows).values(), arrays, strict=True)]
        for rows, arrays in ((Operands, ops), (Results, results))
    )
    text = " -> ".join(", ".join(map(" ".join, side)) for side in sides)
    return text, {"j": per_kv_head} if kv_heads > 1 and per_kv_head > 1 else {}


def _own_positions(ops: Operands, axes: Axes) -> Any:
    """The last row that each query sees, in the numbering of this device's rows of each block."""
    R = ops.k_cache.shape[-3]
    if ops.table.shape[-1] == 1:  # the rows of one block, which a window counts as well
        return shard_positions(ops.positions, R, axes)
    positions, first = jnp.maximum(ops.positions, -1), lax.axis_index(axes) * R
    whole = R * lax.axis_size(axes)
    in_block = jnp.clip(positions % whole - first, -1, R - 1)
    return jnp.where(positions >= 0, positions // whole * R + in_block, -1)


def _shard(ops: Operands, call: Call, layout: Layout, mesh: Any) -> Any:
    """One device's part: its own heads of its own sequences, over the rows that it has."""
    real = functools.partial(real_axes, mesh)
    blocks, rows, merged = tuple(map(real, layout.blocks)), real(layout.rows), real(layout.merged)
    # Sequence b reads block b of a part where neither is split, or both are split alike.
    split = real(layout.queries[-2]) or blocks[-1]
    changes = {"contiguous": False} if split and not layout.aligned else {}
    if any(blocks):
        n_dims = ops.k_cache.shape[len(layout.queries) - 2 : -3]
        shards = [num_shards(mesh, axes) for axes in blocks]
        ops = ops._replace(table=shard_slots(ops.table, n_dims, blocks, shards))
    if not merged:
        return call.run(ops, **changes)
    if rows:
        ops = ops._replace(positions=_own_positions(ops, rows))
    part = ops._replace(q=ops.q.astype(jnp.float32), sinks=jnp.zeros((0,), jnp.float32))
    out, lse = call.run(part, return_lse=True, **changes)
    sinks = None if is_absent(ops.sinks) else ops.sinks[..., None, None, :]
    out, lse = merge_over_axes(out, lse, merged, sinks)
    return out.astype(ops.q.dtype), lse if call.options.return_lse else absent()


SHARDING = Sharding(
    layout_of,
    operand_specs,
    result_specs,
    rule,
    _shard,
    settled=("k_cache", "v_cache"),
    plain_is_fine=True,
)
