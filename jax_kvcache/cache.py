"""KV caches as pytrees: int8 codes with their scales, written in place by the operator."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_kvcache._cache import CacheBase
from jax_kvcache._cache_checks import check_int32, check_positions, empty_fields
from jax_kvcache._checks import INT32_MAX


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class KVCache(CacheBase):
    """A contiguous int8 KV cache: each sequence has C2 rows of its own.

    A pytree: it goes through jit, donation, scan, vmap and `jax.tree` as it is. Donate it to the
    jitted step that updates it, and the codes are written in place; called eagerly, `update`
    copies the caches. With `layers` all layers live in one array, so that a scan over layers
    carries one cache and writes it in place.

    Attributes:
      k_cache: [B, C2, Nkv, D] int8, or [L, B, C2, Nkv, D] with layers.
      v_cache: as k_cache.
      scale_k: [Nkv, D] float32, or [L, Nkv, D]: the value of one step of the code.
      scale_v: as scale_k.
      offset_k: as scale_k, in steps of the code, or None.
      offset_v: as offset_k.
      layers: L, or None.
    """

    @classmethod
    def create(
        cls,
        batch: int,
        length: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        layers: int | None = None,
        scale_k: ArrayLike,
        scale_v: ArrayLike,
        offset_k: ArrayLike | None = None,
        offset_v: ArrayLike | None = None,
    ) -> Self:
        """Makes an empty cache (all codes 0).

        Args:
          batch: sequences, B.
          length: rows per sequence, C2.
          num_kv_heads: Nkv.
          head_dim: D, even.
          layers: L, or None for a cache of one layer without a layer dimension.
          scale_k: [Nkv, D] float, or [L, Nkv, D] with layers; copied.
          scale_v: as scale_k.
          offset_k: as scale_k; given together with offset_v or not at all.
          offset_v: as offset_k.

        Returns:
          The cache.

        Raises:
          TypeError: a size is not an int, or a scale or offset is not floating-point.
          ValueError: a size is below 1, `head_dim` is odd, a shape is not as above, a lone offset,
            or more rows than int32 counts.
        """
        sizes = {"batch": batch, "length": length}
        return cls(
            **empty_fields(
                sizes, num_kv_heads, head_dim, layers, scale_k, scale_v, offset_k, offset_v
            )
        )

    def update(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        positions: ArrayLike,
        *,
        weight_scale: jax.Array | None = None,
        activation_scale: jax.Array | None = None,
        bias: jax.Array | None = None,
        block_table: None = None,
        layer: ArrayLike | None = None,
        implementation: str | None = None,
    ) -> tuple[jax.Array, Self]:
        """Writes S tokens of each sequence; see `dequant_rope_quant_kvcache` for the arithmetic.

        Args:
          x: [B, S, H] int32, float16, bfloat16 or float32, H = (Nq + 2*Nkv) * D.
          cos: [B, S, 1, D], see `rope_tables`.
          sin: as cos.
          positions: [B] int32, the row of each sequence's first token; negative skips the
            sequence, and tokens past the last row are dropped.
          weight_scale: [H] float32; required when x is int32.
          activation_scale: [B, S] or [B*S] float32.
          bias: [H] float32, float16, bfloat16 or int32.
          block_table: None; a `PagedKVCache` has one.
          layer: the layer to write, an int or an integer scalar; for a cache with layers only. A
            traced one that does not exist writes nothing (q is computed all the same).
          implementation: None, "ffi" or "xla".

        Returns:
          q [B, S, Nq, D] in the dtype of cos, and the cache.

        Raises:
          TypeError: a wrong dtype or rank, or an argument that does not go with this cache.
          ValueError: a wrong shape or value.
          NotImplementedError: `implementation="ffi"` where there is no native target.
        """
        if block_table is not None:
            raise TypeError(
                "`block_table` must be None for a KVCache: only a PagedKVCache has one."
            )
        positions = check_positions(positions, "B", x)
        params = dict(
            weight_scale=weight_scale,
            activation_scale=activation_scale,
            bias=bias,
            implementation=implementation,
        )
        return self.write(x, cos, sin, positions, "contiguous", layer, params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
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

        Returns:
          The cache.

        Raises:
          TypeError: a size is not an int, or a scale or offset is not floating-point.
          ValueError: a size is below 1, `head_dim` is odd, a shape is not as above, a lone offset,
            or more rows than int32 counts.
        """
        sizes = {"num_blocks": num_blocks, "block_size": block_size}
        return cls(
            **empty_fields(
                sizes, num_kv_heads, head_dim, layers, scale_k, scale_v, offset_k, offset_v
            )
        )

    def update(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        positions: ArrayLike,
        *,
        weight_scale: jax.Array | None = None,
        activation_scale: jax.Array | None = None,
        bias: jax.Array | None = None,
        block_table: ArrayLike | None = None,
        layer: ArrayLike | None = None,
        implementation: str | None = None,
    ) -> tuple[jax.Array, Self]:
        """Writes S tokens of each sequence to the rows that the block table gives them.

        Args, returns and errors are those of `KVCache.update`, but for these.

        Args:
          positions: [B, S] int32, the position of each token in its sequence; negative skips it.
          block_table: [B, M] int32, required; see `slots_from_block_table`. A token whose block is
            not allocated, or does not exist, is skipped.
        """
        if block_table is None:
            raise TypeError("`block_table` is required for a PagedKVCache, got None.")
        positions = check_positions(positions, "B, S", x)
        indices = slots_from_block_table(block_table, positions, self.k_cache.shape[-3])
        params = dict(
            weight_scale=weight_scale,
            activation_scale=activation_scale,
            bias=bias,
            implementation=implementation,
        )
        return self.write(x, cos, sin, indices, "page", layer, params)


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
    positions = check_int32("positions", positions, "B, S")
    block_table = check_int32("block_table", block_table, "B, M", (positions.shape[0], None))
    if isinstance(block_size, bool) or not isinstance(block_size, int | np.integer):
        raise TypeError(f"`block_size` must be an int, got {block_size!r}.")
    block_size = int(block_size)
    if not 1 <= block_size <= INT32_MAX:
        raise ValueError(f"`block_size` must be in [1, {INT32_MAX}], got {block_size}.")
    entries = block_table.shape[1]
    entry = positions // block_size
    known = (positions >= 0) & (entry < entries)
    if entries:
        blocks = jnp.take_along_axis(block_table, jnp.clip(entry, 0, entries - 1), axis=1)
    else:
        blocks = jnp.full_like(positions, -1)
    # A block number past this one would wrap around into somebody else's row.
    known = known & (blocks >= 0) & (blocks < INT32_MAX // block_size)
    return jnp.where(known, blocks * block_size + positions % block_size, -1)
