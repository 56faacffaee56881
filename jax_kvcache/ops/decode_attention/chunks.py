"""The chunks of rows in which the reference reads a cache: how large, which rows, and the read."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Bytes that one chunk may take in float32, K, V and scores together, and the fewest and the most
# rows that it has. A loop's step costs little on a CPU, and on a GPU or TPU the launch of several
# kernels. A CPU adds up a chunk's rows one after the other; 4,096 of them may lose 5e-5 of the sum.
_BUDGET = {"cpu": 1 << 20}
_LARGE_BUDGET = 256 << 20
_FEWEST_ROWS = 128
_MOST_ROWS = {"cpu": 256}
_MOST_ROWS_ELSEWHERE = 8192


def target_rows(platform: str, batch: int, steps: int, q_heads: int, kv_width: int) -> int:
    """How many rows of each sequence a chunk should have."""
    budget = _BUDGET.get(platform, _LARGE_BUDGET)
    bytes_per_row = 4 * batch * (2 * kv_width + 2 * q_heads * steps)
    rows = budget // max(bytes_per_row, 1) if isinstance(bytes_per_row, int) else _FEWEST_ROWS
    most = _MOST_ROWS.get(platform, _MOST_ROWS_ELSEWHERE)
    return min(max(1 << max(rows, 1).bit_length() - 1, _FEWEST_ROWS), most)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """A chunk is `blocks` whole blocks of the table, or `rows_read` rows of one block.

    Attributes:
      batch: sequences.
      numbers: of each cache dimension before R, what [B, M] table entries name.
      exists: [B, M], whether an entry names a block.
      contiguous: whether sequence b reads block b, so that one slice reads all sequences.
      R: rows per block.
      blocks: blocks per chunk.
      parts: chunks per block, 1 where a chunk has whole blocks.
      rows_read: rows of a block that a chunk reads.
    """

    batch: Any
    numbers: tuple[jax.Array, ...]
    exists: jax.Array
    contiguous: bool
    R: Any
    blocks: Any
    parts: Any
    rows_read: Any

    @classmethod
    def of(cls, ops: Any, platform: str, steps: int) -> "Chunks":
        """The chunks of a call without group dimensions."""
        R, kv_heads, head_dim = ops.k_cache.shape[-3:]
        batch, entries = ops.exists.shape
        q_heads = ops.q.shape[-2]
        target = target_rows(platform, batch, steps, q_heads, kv_heads * head_dim)
        if isinstance(R, int) and target < R:
            blocks, parts, rows_read = 1, -(-R // target), target
        else:
            blocks, parts, rows_read = 1, 1, R
            if isinstance(R, int) and isinstance(entries, int):
                blocks = max(min(target // R, entries), 1)
        return cls(batch, ops.blocks, ops.exists, ops.contiguous, R, blocks, parts, rows_read)

    def _place(self, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """A step's first block, as wanted and moved back into the table; its first row likewise."""
        entries = jnp.asarray(self.exists.shape[1], jnp.int32)
        block = step // self.parts * self.blocks
        row = step % self.parts * self.rows_read
        moved_block = jnp.minimum(block, jnp.maximum(entries - self.blocks, 0))
        return block, moved_block, row, jnp.minimum(row, self.R - self.rows_read)

    def rows(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The rows of a step, [c], and whether each is there and new, [B, c].

        The last chunk of a block or of the table reaches back to stay inside; the rows that an
        earlier chunk had are not new.
        """
        block, moved_block, row, moved_row = self._place(step)
        in_blocks = moved_block + jnp.arange(self.blocks, dtype=jnp.int32)
        in_rows = moved_row + jnp.arange(self.rows_read, dtype=jnp.int32)
        numbers = (in_blocks[:, None] * self.R + in_rows[None, :]).reshape(-1)
        new = ((in_blocks >= block)[:, None] & (in_rows >= row)[None, :]).reshape(1, -1)
        there = jnp.take(self.exists, in_blocks, axis=1, mode="clip")  # [B, blocks]
        there = jnp.broadcast_to(there[:, :, None], (*there.shape, self.rows_read))
        there = there.reshape(there.shape[0], numbers.shape[0])
        # A row number that int32 cannot hold is negative here.
        return numbers, there & new & (numbers >= 0)[None, :]

    def bounds(self, positions: jax.Array, window: int) -> tuple[jax.Array, jax.Array]:
        """The first step and the one after the last that some query sees a row of."""
        steps_per_block = self.parts
        entries = self.exists.shape[1]
        total = -(-entries // self.blocks) * steps_per_block
        highest = jnp.iinfo(jnp.int32).max
        # The step of the highest position, with 1 added, could wrap around.
        furthest = jnp.minimum(positions.max(initial=-1), highest - 1)
        last = jnp.clip(self._step_of(furthest) + 1, 0, total)
        if not window:
            return jnp.zeros_like(last), last
        # A query that sees nothing must not begin the loop at 0.
        begins = jnp.where(positions >= 0, jnp.maximum(positions - (window - 1), 0), highest)
        first = jnp.clip(self._step_of(begins.min(initial=highest)), 0, total)
        return jnp.minimum(first, last), last

    def _step_of(self, row: jax.Array) -> jax.Array:
        """The step that reads a row; -1 or less for a negative row."""
        R = jnp.asarray(self.R, jnp.int32)
        in_block = row // R
        return in_block // self.blocks * self.parts + row % R // self.rows_read

    def read(self, codes: jax.Array, offset: jax.Array | None, step: jax.Array) -> jax.Array:
        """The rows of a step less the offset: [B, c, Nkv, D] float32."""
        _, block, _, row = self._place(step)
        read = self._read_all_sequences if self.contiguous else self._read_blocks
        values = read(codes, block, row).astype(jnp.float32)
        if offset is not None:
            values = values - offset[:, None]
        return values

    def _read_all_sequences(self, codes: jax.Array, block: jax.Array, row: jax.Array) -> jax.Array:
        del block  # sequence b has one, and it is block b
        index = jnp.stack([*(number[0, 0] for number in self.numbers[:-1]), row])
        lead = len(self.numbers) - 1
        sizes = (*[1] * lead, self.batch, self.rows_read, *codes.shape[-2:])
        return _gather(codes, index, sizes, (*range(lead), lead + 1), collapsed=lead, kept=0)

    def _read_blocks(self, codes: jax.Array, block: jax.Array, row: jax.Array) -> jax.Array:
        entries = block + jnp.arange(self.blocks, dtype=jnp.int32)
        chosen = [jnp.take(number, entries, axis=1, mode="clip") for number in self.numbers]
        index = jnp.stack([*chosen, jnp.broadcast_to(row, chosen[0].shape)], axis=-1)
        lead = len(self.numbers)
        sizes = (*[1] * lead, self.rows_read, *codes.shape[-2:])
        read = _gather(codes, index, sizes, tuple(range(lead + 1)), collapsed=lead, kept=2)
        return read.reshape(self.batch, self.blocks * self.rows_read, *codes.shape[-2:])


def _gather(
    codes: jax.Array,
    index: jax.Array,
    sizes: tuple[int, ...],
    indexed: tuple[int, ...],
    *,
    collapsed: int,
    kept: int,
) -> jax.Array:
    """Slices of a cache: its first `collapsed` dimensions go, `kept` dimensions of index come."""
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(kept, kept + len(sizes) - collapsed)),
        collapsed_slice_dims=tuple(range(collapsed)),
        start_index_map=indexed,
    )
    return lax.gather(codes, index, numbers, sizes, mode="clip")
