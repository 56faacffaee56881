"""The paged KV cache: blocks of rows, given to sequences by a block table."""

import dataclasses
from typing import Literal, Self

import jax
from jax.typing import ArrayLike

from jax_kvcache.caches.base import CacheBase
from jax_kvcache.caches.block_copies import copy_pairs
from jax_kvcache.caches.checks import check_caches, check_positions, empty_fields
from jax_kvcache.caches.saturation import Saturation, shares_at_ends
from jax_kvcache.export import register_dataclass_serialization
from jax_kvcache.ops.checks import check_int, check_int32
from jax_kvcache.ops.explicit import automatically
from jax_kvcache.ops.slots import (
    INT32_MAX,
    block_table_slots,
    rows_below,
    rows_of_blocks,
)


@register_dataclass_serialization
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PagedKVCache(CacheBase):
    """A paged int8 KV cache: blocks of rows, given to sequences by a block table.

    A pytree, used like `KVCache`; the block table stays with the caller.

    Attributes:
      k_cache: [num_blocks, block_size, Nkv, D] int8, or [L, num_blocks, block_size, Nkv, D].
      v_cache: as k_cache.
      scale_k: [Nkv, D] float32, or [L, Nkv, D]: the value of one step of the code.
      scale_v: as scale_k.
      offset_k: as scale_k, in steps of the code, or None.
      offset_v: as offset_k.
      layers: L, or None.
      num_q_heads: Nq of all devices together, which `update` compares with the columns of x, or
        None.
    """

    @classmethod
    def create(
        cls,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        layers: int | None = None,
        scale_k: ArrayLike,
        scale_v: ArrayLike,
        offset_k: ArrayLike | None = None,
        offset_v: ArrayLike | None = None,
        num_q_heads: int | None = None,
    ) -> Self:
        """Makes an empty cache (all codes 0).

        Args:
          num_blocks: blocks, shared by all sequences.
          block_size: rows per block.
          num_kv_heads: Nkv.
          head_dim: D, even.
          layers: L, or None for a cache of one layer without a layer dimension. A block number
            names a block in every layer.
          scale_k: [Nkv, D] float, or [L, Nkv, D] with layers; copied.
          scale_v: as scale_k.
          offset_k: as scale_k; given together with offset_v or not at all.
          offset_v: as offset_k.
          num_q_heads: Nq, which makes a wrong number of columns in x an error of `update`.

        Returns:
          The cache.

        Raises:
          TypeError: a size is not an int, or a scale or offset is not floating-point.
          ValueError: a size is below 1, `head_dim` is odd, a shape is not as above, a lone offset,
            more rows than int32 counts, or a scale whose value is known and is not a normal number
            above 0, or such an offset that is not finite.
        """
        sizes = {"num_blocks": num_blocks, "block_size": block_size}
        scales = (scale_k, scale_v, offset_k, offset_v)
        return cls(**empty_fields(sizes, num_kv_heads, head_dim, layers, num_q_heads, *scales))

    def saturation(self, lengths: ArrayLike, *, block_table: ArrayLike) -> Saturation:
        """The share of the codes in use that lie at either end; see `KVCache.saturation`.

        A row that several sequences share counts once. It reads every block of every layer, also
        those that no sequence has.

        Args:
          lengths: [B] int32, the rows of each sequence that are in use.
          block_table: [B, M] int32, see `slots_from_block_table`.

        Returns:
          The shares of K and of V, each a float32 scalar, or [L] with layers.

        Raises:
          TypeError: an argument is not int32 or has another rank.
          ValueError: the batch sizes differ.
        """
        check_caches(self)
        lengths = check_int32("lengths", lengths, "B")
        table = check_int32("block_table", block_table, "B, M", (lengths.shape[0], None))
        blocks, block_size = self.k_cache.shape[-4:-2]
        rows = automatically(
            lambda table, lengths: rows_of_blocks(table, lengths, blocks, block_size),
            jax.sharding.PartitionSpec(),
            table,
            lengths,
        )
        in_use = rows_below(rows, block_size)
        return shares_at_ends(self.k_cache, self.v_cache, in_use)

    def copy_blocks(self, sources: ArrayLike, destinations: ArrayLike) -> Self:
        """Copies whole blocks of codes, in every layer, one pair after the other.

        This is the copy of copy-on-write, see `BlockAllocator.append`. Inside `jax.jit` with the
        cache donated it is in place, with one block of each layer as its temporary. The pairs that
        copy go first, in their order, and a loop passes over these alone: a skipped pair costs next
        to nothing. Under `jax.vmap` the loop is as long as that of the example with most copies.

        Args:
          sources: [N] int32 block numbers.
          destinations: [N] int32 block numbers. A pair with a number outside [0, num_blocks), -1
            for example, is skipped; a pair sees what the pairs before it wrote.

        Returns:
          The cache.

        Raises:
          TypeError: a dtype or rank is not as above.
          ValueError: there are not as many destinations as sources.
        """
        check_caches(self)
        sources = check_int32("sources", sources, "N")
        destinations = check_int32("destinations", destinations, "N", sources.shape)
        if sources.shape == (0,):
            return self
        with jax.named_scope("copy_blocks"):
            k_cache, v_cache = copy_pairs(self.k_cache, self.v_cache, sources, destinations)
        return dataclasses.replace(self, k_cache=k_cache, v_cache=v_cache)

    def _indices(
        self, x: jax.Array, positions: ArrayLike, block_table: ArrayLike | None
    ) -> tuple[jax.Array, Literal["contiguous", "page"]]:
        if block_table is None:
            raise TypeError("`block_table` is required for a PagedKVCache, got None.")
        positions = check_positions(positions, "B, S", x)
        block_size = self.k_cache.shape[-3]
        return _slots(block_table, positions, block_size, keep_past=True), "page"


def slots_from_block_table(
    block_table: ArrayLike, positions: ArrayLike, block_size: int
) -> jax.Array:
    """Looks up the rows of a paged cache that hold the given positions.

    Args:
      block_table: [B, M] int32, the block that holds rows m * block_size and on of each sequence;
        negative where none is allocated.
      positions: [B, S] int32, the position of each token in its sequence; negative for padding.
      block_size: rows per block.

    Returns:
      [B, S] int32, `block * block_size + position % block_size`, the operator's page-mode indices.
      -1 for padding, for a position past the table, for a block that is not allocated, and for a
      row number that int32 cannot hold.

    Raises:
      TypeError: a rank or a dtype is not as above.
      ValueError: the batch sizes differ, or `block_size` is not above 0.
    """
    return _slots(block_table, positions, block_size)


def _slots(
    block_table: ArrayLike, positions: ArrayLike, block_size: int, *, keep_past: bool = False
) -> jax.Array:
    """What `slots_from_block_table` gives, with INT32_MAX for lost tokens if `keep_past`."""
    positions = check_int32("positions", positions, "B, S")
    block_table = check_int32("block_table", block_table, "B, M", (positions.shape[0], None))
    block_size = check_int("block_size", block_size)
    if not 1 <= block_size <= INT32_MAX:
        raise ValueError(f"`block_size` must be in [1, {INT32_MAX}], got {block_size}.")
    return block_table_slots(block_table, positions, block_size, keep_past=keep_past)
