"""Which sequences there are, and their blocks: what can be asked without a change."""

import collections
from collections.abc import Mapping, Sequence

import numpy as np

from jax_kvcache.caches.pool import BlockPool
from jax_kvcache.ops.checks import check_int
from jax_kvcache.ops.slots import INT32_MAX


class Sequences:
    """The part of `BlockAllocator` that answers."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """See `BlockAllocator`."""
        self.num_blocks = check_int("num_blocks", num_blocks, 1)
        self.block_size = check_int("block_size", block_size, 1)
        if (rows := self.num_blocks * self.block_size) > INT32_MAX:
            raise ValueError(
                f"`num_blocks` * `block_size` must be at most {INT32_MAX} rows, got {rows}."
            )
        self._pool = BlockPool(self.num_blocks)
        self._blocks: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that no sequence has."""
        return self._pool.num_free

    @property
    def sequences(self) -> tuple[int, ...]:
        """The sequences, oldest first."""
        return tuple(self._lengths)

    def length(self, sequence: int) -> int:
        """The tokens of a sequence."""
        return self._lengths[self._known(sequence)]

    def blocks(self, sequence: int) -> tuple[int, ...]:
        """The blocks of a sequence, in the order of its tokens."""
        return tuple(self._blocks[self._known(sequence)])

    def blocks_needed(self, tokens: Mapping[int, int]) -> int:
        """How many free blocks `append_batch` takes for these tokens, copies included.

        Raises:
          TypeError, ValueError: as `append_batch`.
        """
        if not isinstance(tokens, Mapping):
            raise TypeError(f"`tokens` must be a mapping of sequences to numbers, got {tokens!r}.")
        needed, writers = 0, collections.Counter[int]()
        for sequence, count in tokens.items():
            blocks, length = self._blocks[self._known(sequence)], self._lengths[sequence]
            needed += self._blocks_for(length + check_int("tokens", count, 0)) - len(blocks)
            if self._writes_last(sequence, count):
                writers[blocks[-1]] += 1
        # Those that share a block each copy it, but for one that has it alone at the end.
        shared = (min(n, self._pool.references(block) - 1) for block, n in writers.items())
        return needed + sum(shared)

    def block_table(self, sequences: Sequence[int | None], columns: int) -> np.ndarray:
        """The block table of a batch, as `update` and `decode_attention` take it.

        Args:
          sequences: B sequences; None for a place in the batch without one.
          columns: M, the most blocks that a sequence may have. It is a shape of the compiled
            program, so keep it the same from step to step. With RoPE of the types dynamic and
            longrope another M also changes the angles, so give `model.forward` `rows=` where it may
            change.

        Returns:
          [B, M] int32, -1 where a sequence has no block.

        Raises:
          TypeError, ValueError: `columns` is not an int or too small; an unknown sequence.
        """
        table = np.full((len(sequences), check_int("columns", columns, 1)), -1, np.int32)
        for row, sequence in zip(table, sequences, strict=True):
            if sequence is None:
                continue
            blocks = self._blocks[self._known(sequence)]
            if len(blocks) > columns:
                raise ValueError(
                    f"`columns` must be at least {len(blocks)}, the blocks of sequence {sequence}, "
                    f"got {columns}."
                )
            row[: len(blocks)] = blocks
        return table

    def _blocks_for(self, length: int) -> int:
        return -(-length // self.block_size)

    def _writes_last(self, sequence: int, tokens: int) -> bool:
        """Whether new tokens of a sequence go into the block that it has last."""
        return tokens > 0 and self._lengths[sequence] % self.block_size > 0

    def _known(self, sequence: int) -> int:
        if sequence not in self._lengths:
            raise ValueError(f"`sequence` must be one that is allocated, got {sequence!r}.")
        return sequence

    def _part(self, name: str, sequence: int, length: int | None) -> int:
        """A length up to the sequence's; its own for None."""
        own = self._lengths[self._known(sequence)]
        if length is None:
            return own
        length = check_int(name, length, 0)
        if length > own:
            raise ValueError(
                f"`{name}` must be at most {own}, the sequence's length, got {length}."
            )
        return length
