"""The blocks of a `BlockAllocator`: which are free, and how many sequences have the others."""

import copy
from collections.abc import Iterable
from typing import Self

from jax_kvcache.caches.batch import OutOfBlocksError


class BlockPool:
    """Blocks 0 to count - 1."""

    def __init__(self, count: int) -> None:
        """All of them are free."""
        self._free = list(range(count - 1, -1, -1))  # the last one is the next to be given
        self._references = [0] * count

    @property
    def num_free(self) -> int:
        """Blocks that no sequence has."""
        return len(self._free)

    def references(self, block: int) -> int:
        """How many sequences have a block."""
        return self._references[block]

    def take(self, count: int) -> list[int]:
        """So many blocks, each with one reference.

        Raises:
          OutOfBlocksError: too few are free; none is taken.
        """
        self.check(count)
        blocks = [self._free.pop() for _ in range(count)]
        self.share(blocks)
        return blocks

    def check(self, count: int) -> None:
        """Raises OutOfBlocksError unless so many blocks are free."""
        if count > len(self._free):
            raise OutOfBlocksError(
                f"{count} blocks are needed and {len(self._free)} of {len(self._references)} are "
                "free."
            )

    def share(self, blocks: Iterable[int]) -> None:
        """One reference more to each of them."""
        for block in blocks:
            self._references[block] += 1

    def drop(self, blocks: Iterable[int]) -> None:
        """One reference less to each of them; those without any are free."""
        for block in blocks:
            self._references[block] -= 1
            if not self._references[block]:
                self._free.append(block)

    def copy(self) -> Self:
        """As it is now, whatever is taken and dropped later."""
        other = copy.copy(self)
        other._free, other._references = self._free[:], self._references[:]
        return other
