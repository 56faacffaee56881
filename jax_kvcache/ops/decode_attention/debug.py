"""What `jax.experimental.checkify` finds in a call: rows that a query should see and cannot.

None of it is in a program that is not transformed by checkify.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jax_kvcache._compat import Finding
from jax_kvcache.ops.decode_attention.reference import AttentionOptions, Operands
from jax_kvcache.ops.explicit import automatically
from jax_kvcache.ops.indexing import take_one
from jax_kvcache.ops.operands import group_rank_of
from jax_kvcache.ops.slots import is_row

Numbers = dict[str, jax.Array]


def findings(operands: Operands, options: AttentionOptions) -> Iterator[Finding]:
    """The findings in one call, on the primitive's operands."""
    if 0 in operands.positions.shape:
        return
    count = functools.partial(_count, operands.k_cache.shape[group_rank_of(operands) :], options)
    arguments = (PartitionSpec(), operands.positions, operands.table)
    past, missing = automatically(count, *arguments)
    yield Finding(
        failed=past["past"] > 0,
        message=(
            "{past} of {queries} queries of decode_attention see fewer rows than they ask for: "
            "their positions are past the end of the cache or of the block table. The first is "
            "query {query} of sequence {sequence}, at position {position} of {rows} rows (with "
            "`lengths`, a sequence's last query is at position length - 1)"
        ),
        numbers=past,
        out_of_bounds=True,
    )
    if not options.partial:
        yield Finding(
            failed=missing["missing"] > 0,
            message=(
                "the queries of decode_attention need {needed} blocks, of which {missing} are not "
                "there: the block table names none of the cache's {blocks} blocks, or the layer "
                "does not exist. The first is entry {entry} of sequence {sequence}, for rows "
                "{row} and on"
            ),
            numbers=missing,
            out_of_bounds=True,
        )


def _count(
    cache: tuple[Any, ...], options: AttentionOptions, positions: jax.Array, table: jax.Array
) -> tuple[Numbers, Numbers]:
    """The numbers of queries past the end, and of blocks that are missing.

    Args:
      cache: [*n, R, Nkv, D], the shape of one group's cache.
      options: the primitive's.
      positions: [*g, B, S].
      table: [*g, B, M].
    """
    *_, blocks, R = (jnp.asarray(size, jnp.int32) for size in cache[:-2])
    there = is_row(table, math.prod(cache[:-3]))
    if options.axes and options.contiguous:  # the rows of all devices
        positions = positions + lax.axis_index(options.axes) * R
        R = R * lax.axis_size(options.axes)
    elif options.axes:  # a block is where some device has it
        there = lax.psum(there.astype(jnp.int32), options.axes) > 0
        blocks = blocks * lax.axis_size(options.axes)
    steps, entries = positions.shape[-1], jnp.asarray(table.shape[-1], jnp.int32)
    positions, there = positions.reshape(-1, steps), there.reshape(-1, table.shape[-1])
    begin = jnp.maximum(positions - (options.window - 1), 0) if options.window else 0
    first, last = begin // R, jnp.where(positions >= 0, positions // R, -1)
    entry = jnp.arange(there.shape[1], dtype=jnp.int32)
    seen = (entry >= jnp.expand_dims(first, -1)) & (entry <= jnp.expand_dims(last, -1))
    needed = seen.any(axis=1)  # [B, S, M] -> [B, M]
    past, missing = last >= entries, needed & ~there
    query, lost = (jnp.argmax(a.reshape(-1)).astype(jnp.int32) for a in (past, missing))
    return {
        "past": past.sum(dtype=jnp.int32),
        "queries": (positions >= 0).sum(dtype=jnp.int32),
        "query": query % jnp.asarray(steps, jnp.int32),
        "sequence": query // jnp.asarray(steps, jnp.int32),
        "position": take_one(positions.reshape(-1), query),
        "rows": entries * R,
    }, {
        "missing": missing.sum(dtype=jnp.int32),
        "needed": needed.sum(dtype=jnp.int32),
        "blocks": blocks,
        "entry": lost % entries,
        "sequence": lost // entries,
        "row": lost % entries * R,
    }
