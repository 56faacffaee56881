"""Which sequence has which blocks of a `PagedKVCache`: on the host, with reference counts."""

from collections.abc import Mapping, Sequence

import numpy as np

from jax_kvcache.caches.batch import BlockCopy, OutOfBlocksError, RaggedBatch, ragged_positions
from jax_kvcache.ops.checks import check_int
from jax_kvcache.ops.slots import INT32_MAX


class BlockAllocator:
    """Gives the blocks of a `PagedKVCache` to sequences, and lets sequences share them.

    A sequence is a number that `allocate` or `fork` returned; its token t is in row
    t % block_size of its block t // block_size. Sequences that have a prefix in common share its
    blocks. A shared block is never written: `append` gives the sequence a block of its own
    instead, and says which block has to be copied into it (`PagedKVCache.copy_blocks`).

    It holds no arrays and knows nothing of a device. One allocator serves all layers.

        allocator = BlockAllocator(num_blocks=64, block_size=16)
        first = allocator.allocate(100)  # a prompt of 100 tokens
        second = allocator.fork(first)  # shares all 7 blocks
        batch = allocator.append_batch({first: 1, second: 1}, batch=2, columns=8)
        cache = cache.copy_blocks(batch.sources, batch.destinations)  # before the write
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """All blocks are free.

        Args:
          num_blocks: blocks of the cache.
          block_size: rows per block.

        Raises:
          TypeError: an argument is not an int.
          ValueError: an argument is below 1, or there are more than 2**31 - 1 rows.
        """
        self.num_blocks = check_int("num_blocks", num_blocks, 1)
        self.block_size = check_int("block_size", block_size, 1)
        if (rows := self.num_blocks * self.block_size) > INT32_MAX:
            raise ValueError(
                f"`num_blocks` * `block_size` must be at most {INT32_MAX} rows, got {rows}."
            )
        self._free = list(range(num_blocks - 1, -1, -1))  # the last one is the next to be given
        self._references = [0] * num_blocks
        self._blocks: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next_sequence = 0

    @property
    def num_free(self) -> int:
        """Blocks that no sequence has."""
        return len(self._free)

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

    def allocate(self, length: int = 0) -> int:
        """Makes a sequence with rows of its own for `length` tokens.

        Returns:
          The sequence's number; no other sequence, living or freed, has it.

        Raises:
          OutOfBlocksError: too few blocks are free.
          TypeError, ValueError: `length` is not an int, or is negative.
        """
        length = check_int("length", length, 0)
        return self._add(self._take(self._blocks_for(length)), length)

    def append(self, sequence: int, tokens: int = 1) -> BlockCopy:
        """Makes a sequence longer by `tokens`, with rows that no other sequence has.

        Returns:
          What to copy before these tokens are written: the last block, where it has room left and
          is shared. (-1, -1), which `PagedKVCache.copy_blocks` skips, where there is nothing to
          copy. Copies of several calls have to be made in the order of the calls.

        Raises:
          OutOfBlocksError: too few blocks are free.
          TypeError, ValueError: `tokens` is not an int, or is negative; an unknown sequence.
        """
        blocks, length = self._blocks[self._known(sequence)], self._lengths[sequence]
        end = length + check_int("tokens", tokens, 0)
        writes_last = tokens > 0 and length % self.block_size > 0
        copies_last = writes_last and self._references[blocks[-1]] > 1
        new = self._take(self._blocks_for(end) - len(blocks) + copies_last)
        copy = BlockCopy(-1, -1)
        if copies_last:
            copy = BlockCopy(blocks[-1], new[0])
            self._drop(blocks[-1:])
            blocks.pop()
        blocks.extend(new)
        self._lengths[sequence] = end
        return copy

    def append_batch(
        self, tokens: Mapping[int, int], *, batch: int, columns: int, steps: int | None = None
    ) -> RaggedBatch:
        """`append` for all sequences of a step, and the arrays that the step takes.

        Args:
          tokens: how many tokens each sequence gets; they have the first places of the batch.
          batch: B, at least the number of sequences, and 1. B, M and S are shapes of the compiled
            program, so use few of them.
          columns: M, see `block_table`.
          steps: S, at least the most tokens that a sequence gets; None rounds that number up to a
            power of two.

        Returns:
          The positions, the block table and the copies.

        Raises:
          OutOfBlocksError: too few blocks are free.
          TypeError, ValueError: a size or a number is not an int, or is too small; an unknown
            sequence. After any of these errors the allocator is as it was before.
        """
        if not isinstance(tokens, Mapping):
            raise TypeError(f"`tokens` must be a mapping of sequences to numbers, got {tokens!r}.")
        padding = check_int("batch", batch, max(len(tokens), 1)) - len(tokens)
        free, references, lengths = self._free[:], self._references[:], dict(self._lengths)
        blocks = {sequence: self._blocks[self._known(sequence)][:] for sequence in tokens}
        try:
            copies = [self.append(sequence, count) for sequence, count in tokens.items()]
            most = max([1, *map(int, tokens.values())])
            steps = 1 << (most - 1).bit_length() if steps is None else steps
            steps = check_int("steps", steps, most)
            table = self.block_table([*tokens, *[None] * padding], columns)
            starts = [*map(lengths.__getitem__, tokens), *[0] * padding]
            positions = ragged_positions(starts, [*tokens.values(), *[0] * padding], steps)
        except Exception:
            self._free, self._references, self._lengths = free, references, lengths
            self._blocks |= blocks
            raise
        pairs = np.array([*copies, *[BlockCopy(-1, -1)] * padding], np.int32).reshape(-1, 2)
        return RaggedBatch(positions, table, *pairs.T)

    def fork(self, sequence: int, length: int | None = None) -> int:
        """Makes a sequence that starts with the tokens of another one and shares their blocks.

        Args:
          sequence: the one to share with; both go on independently.
          length: how many of its tokens are shared; None: all.

        Returns:
          The new sequence's number.

        Raises:
          TypeError, ValueError: `length` is not an int in [0, the sequence's length]; an unknown
            sequence.
        """
        length = self._part("length", sequence, length)
        blocks = self._blocks[sequence][: self._blocks_for(length)]
        for block in blocks:
            self._references[block] += 1
        return self._add(blocks, length)

    def truncate(self, sequence: int, length: int) -> None:
        """Takes back all but the first `length` tokens, as when drafted tokens are rejected.

        Raises:
          TypeError, ValueError: `length` is not an int in [0, the sequence's length]; an unknown
            sequence.
        """
        length = self._part("length", sequence, length)
        blocks, kept = self._blocks[sequence], self._blocks_for(length)
        self._drop(blocks[kept:])
        del blocks[kept:]
        self._lengths[sequence] = length

    def free(self, sequence: int) -> None:
        """Ends a sequence; its blocks are free where no other sequence shares them.

        Raises:
          ValueError: an unknown sequence, or one that has been freed.
        """
        self._drop(self._blocks.pop(self._known(sequence)))
        del self._lengths[sequence]

    def block_table(self, sequences: Sequence[int | None], columns: int) -> np.ndarray:
        """The block table of a batch, as `update` and `decode_attention` take it.

        Args:
          sequences: B sequences; None for a place in the batch without one.
          columns: M, the most blocks that a sequence may have. It is a shape of the compiled
            program, so keep it the same from step to step.

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

    def _add(self, blocks: list[int], length: int) -> int:
        sequence = self._next_sequence
        self._next_sequence += 1
        self._blocks[sequence], self._lengths[sequence] = blocks, length
        return sequence

    def _take(self, count: int) -> list[int]:
        if count > len(self._free):
            raise OutOfBlocksError(
                f"{count} blocks are needed and {len(self._free)} of {self.num_blocks} are free."
            )
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def _drop(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._references[block] -= 1
            if not self._references[block]:
                self._free.append(block)
