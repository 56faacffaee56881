"""What `BlockAllocator` answers: blocks to copy, a step's arrays, or that too few are free."""

from typing import NamedTuple

import numpy as np

from jax_kvcache.export import register_namedtuple_serialization


class OutOfBlocksError(RuntimeError):
    """Too few blocks are free; the allocator is as it was before the call."""


class BlockCopy(NamedTuple):
    """One block to copy before the next write; both are -1 where there is nothing to copy."""

    source: int
    destination: int


@register_namedtuple_serialization
class RaggedBatch(NamedTuple):
    """Where the new tokens of a step are, whose sequences may have different numbers of them.

    A pytree, an argument of a jitted step. A place without a sequence is all -1. If the step does
    not run, `BlockAllocator.undo` takes it back; else the sequences count on its copies.

    Attributes:
      positions: [B, S] int32, the position of each new token in its sequence; -1 for padding.
      block_table: [B, M] int32, -1 where a sequence has no block.
      sources: [B] int32, blocks to copy before the new tokens are written, see
        `PagedKVCache.copy_blocks`; -1 for none.
      destinations: [B] int32, the blocks to copy them to.
    """

    positions: np.ndarray
    block_table: np.ndarray
    sources: np.ndarray
    destinations: np.ndarray


def ragged_positions(starts: list[int], tokens: list[int], steps: int) -> np.ndarray:
    """[B, S] int32: the positions of so many tokens from each start on; -1 for padding."""
    step = np.arange(steps, dtype=np.int32)[None, :]
    first, count = (np.array(numbers, np.int32)[:, None] for numbers in (starts, tokens))
    return np.where(step < count, first + step, np.int32(-1))
