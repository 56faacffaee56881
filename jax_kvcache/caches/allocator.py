"""Which sequence has which blocks of a `PagedKVCache`: on the host, with reference counts."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jax_kvcache.caches.batch import BlockCopy, RaggedBatch, ragged_positions
from jax_kvcache.caches.pool import BlockPool
from jax_kvcache.caches.sequences import Sequences
from jax_kvcache.ops.checks import check_int


class _State(NamedTuple):
    """What `append_batch` changes: the pool, the blocks of its sequences, and all lengths."""

    pool: BlockPool
    blocks: dict[int, list[int]]
    lengths: dict[int, int]


class BlockAllocator(Sequences):
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
        super().__init__(num_blocks, block_size)
        self._next_sequence = 0
        self._before_batch: _State | None = None  # what `undo` goes back to

    def allocate(self, length: int = 0) -> int:
        """Makes a sequence with rows of its own for `length` tokens.

        Returns:
          The sequence's number; no other sequence, living or freed, has it.

        Raises:
          OutOfBlocksError: too few blocks are free.
          TypeError, ValueError: `length` is not an int, or is negative.
        """
        length = check_int("length", length, 0)
        return self._add(self._pool.take(self._blocks_for(length)), length)

    def append(self, sequence: int, tokens: int = 1) -> BlockCopy:
        """Makes a sequence longer by `tokens`, with rows that no other sequence has.

        Returns:
          What to copy before these tokens are written: the last block, where it has room left and
          is shared. (-1, -1), which `PagedKVCache.copy_blocks` skips, where there is nothing to
          copy. Copies of several calls have to be made in the order of the calls, and also if the
          tokens are never written: `truncate` does not go back to the shared block.

        Raises:
          OutOfBlocksError: too few blocks are free.
          TypeError, ValueError: `tokens` is not an int, or is negative; an unknown sequence.
        """
        blocks, length = self._blocks[self._known(sequence)], self._lengths[sequence]
        end = length + check_int("tokens", tokens, 0)
        copies_last = self._writes_last(sequence, tokens) and self._pool.references(blocks[-1]) > 1
        new = self._pool.take(self._blocks_for(end) - len(blocks) + copies_last)
        copy = BlockCopy(-1, -1)
        if copies_last:
            copy = BlockCopy(blocks.pop(), new[0])
            self._pool.drop([copy.source])
        blocks.extend(new)
        self._lengths[sequence] = end
        self._before_batch = None
        return copy

    def append_batch(
        self, tokens: Mapping[int, int], *, batch: int, columns: int, steps: int | None = None
    ) -> RaggedBatch:
        """`append` for all sequences of a step, and the arrays that the step takes.

        The step computes B * S tokens. Where one sequence gets many and the others one each, make
        the arrays from `append` and `block_table` instead: a place in the batch for each token,
        S = 1.

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
          OutOfBlocksError: fewer blocks are free than `blocks_needed`.
          TypeError, ValueError: a size or a number is not an int, or is too small; an unknown
            sequence. After any of these errors the allocator is as it was before.
        """
        self._pool.check(self.blocks_needed(tokens))
        padding = check_int("batch", batch, max(len(tokens), 1)) - len(tokens)
        lengths = dict(self._lengths)
        blocks = {sequence: self._blocks[sequence][:] for sequence in tokens}
        before, batch_before = _State(self._pool.copy(), blocks, lengths), self._before_batch
        try:
            copies = [self.append(sequence, count) for sequence, count in tokens.items()]
            most = max([1, *map(int, tokens.values())])
            steps = 1 << (most - 1).bit_length() if steps is None else steps
            steps = check_int("steps", steps, most)
            table = self.block_table([*tokens, *[None] * padding], columns)
            starts = [*map(lengths.__getitem__, tokens), *[0] * padding]
            positions = ragged_positions(starts, [*tokens.values(), *[0] * padding], steps)
        except BaseException:  # also one that comes from outside, such as KeyboardInterrupt
            self._go_back(before)
            self._before_batch = batch_before
            raise
        pairs = np.array([*copies, *[BlockCopy(-1, -1)] * padding], np.int32).reshape(-1, 2)
        self._before_batch = before
        return RaggedBatch(positions, table, *pairs.T)

    def undo(self) -> None:
        """Takes back the last `append_batch`, whose step did not run.

        `truncate` is for a step that ran: a sequence keeps the blocks of its own that the step
        should have copied.

        Raises:
          ValueError: there is none, or the allocator has changed since.
        """
        if self._before_batch is None:
            raise ValueError("`undo` must follow an `append_batch`, with no other change between.")
        self._go_back(self._before_batch)

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
        self._pool.share(blocks)
        return self._add(blocks, length)

    def truncate(self, sequence: int, length: int) -> None:
        """Takes back all but the first `length` tokens, as when drafted tokens are rejected.

        For a step that did not run there is `undo`.

        Raises:
          TypeError, ValueError: `length` is not an int in [0, the sequence's length]; an unknown
            sequence.
        """
        length = self._part("length", sequence, length)
        blocks, kept = self._blocks[sequence], self._blocks_for(length)
        self._pool.drop(blocks[kept:])
        del blocks[kept:]
        self._lengths[sequence] = length
        self._before_batch = None

    def free(self, sequence: int) -> None:
        """Ends a sequence; its blocks are free where no other sequence shares them.

        Raises:
          ValueError: an unknown sequence, or one that has been freed.
        """
        self._pool.drop(self._blocks.pop(self._known(sequence)))
        del self._lengths[sequence]
        self._before_batch = None

    def _go_back(self, state: _State) -> None:
        self._pool, self._lengths = state.pool, state.lengths
        self._blocks |= state.blocks
        self._before_batch = None

    def _add(self, blocks: list[int], length: int) -> int:
        sequence = self._next_sequence
        self._next_sequence += 1
        self._blocks[sequence], self._lengths[sequence] = blocks, length
        self._before_batch = None
        return sequence
