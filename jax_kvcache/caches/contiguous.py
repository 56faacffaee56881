"""The contiguous KV cache: each sequence has rows of its own."""

import dataclasses
from typing import Literal, Self

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_kvcache.caches.base import CacheBase
from jax_kvcache.caches.calibrated import (
    MARGIN,
    CalibrationCost,
    calibrate_prompt,
    row_padding,
)
from jax_kvcache.caches.checks import check_caches, check_positions, empty_fields
from jax_kvcache.caches.saturation import Saturation, shares_at_ends
from jax_kvcache.export import register_dataclass_serialization
from jax_kvcache.ops.checks import check_int32
from jax_kvcache.ops.slots import rows_below


@register_dataclass_serialization
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
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
      num_q_heads: Nq of all devices together, which `update` compares with the columns of x, or
        None.
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
        num_q_heads: int | None = None,
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
          num_q_heads: Nq, which makes a wrong number of columns in x an error of `update`.

        Returns:
          The cache.

        Raises:
          TypeError: a size is not an int, or a scale or offset is not floating-point.
          ValueError: a size is below 1, `head_dim` is odd, a shape is not as above, a lone offset,
            more rows than int32 counts, or a scale whose value is known and is not a normal number
            above 0, or such an offset that is not finite.
        """
        sizes = {"batch": batch, "length": length}
        scales = (scale_k, scale_v, offset_k, offset_v)
        return cls(**empty_fields(sizes, num_kv_heads, head_dim, layers, num_q_heads, *scales))

    @classmethod
    def calibrated(
        cls,
        k: jax.Array,
        v: jax.Array,
        length: int,
        *,
        lengths: ArrayLike | None = None,
        margin: float = MARGIN,
        num_q_heads: int | None = None,
    ) -> tuple[Self, CalibrationCost]:
        """Makes a cache that holds a first prompt, with scales from that prompt's own K and V.

        For a model that nobody calibrated: run its prompt in float, and decode from this cache. A
        channel's scale gives `margin` times its largest value the last code. For K that is the
        largest value that the channel can have while RoPE turns its pair, (j, j + D/2); and a
        channel that is quiet in the prompt is made ready for half of its head's mean. Values that
        are not finite have no part in the scales, and make the error that comes back NaN. Scales
        never change afterwards; `saturation` tells whether later tokens fit.

        Args:
          k: [B, S, Nkv, D] float, after RoPE, or [L, B, S, Nkv, D] for a cache with layers.
          v: as k.
          length: rows per sequence, C2, at least S.
          lengths: [B] int32, the tokens of each sequence; what follows is padding. None is S.
          margin: above 0 and below 2**20. 1 fits the prompt alone; each factor of 2 above it
            costs one bit.
          num_q_heads: Nq, as in `create`.

        Returns:
          The cache, whose first S rows are the prompt, and what its codes lose of the prompt.

        Raises:
          TypeError: k or v is not a float array of 4 or 5 dimensions.
          ValueError: a shape is not as above, `length` is below S, or `margin` is out of range.
        """
        fields = calibrate_prompt(k, v, lengths, margin)
        batch, steps, heads, head_dim = k.shape[-4:]
        layers = k.shape[0] if k.ndim == 5 else None
        sizes = {"batch": batch, "length": length}
        scales = (fields.scale_k, fields.scale_v, None, None)
        empty = cls(**empty_fields(sizes, heads, head_dim, layers, num_q_heads, *scales))
        if length < steps:
            raise ValueError(
                f"`length` must be at least the prompt's S = {steps} tokens, got {length}."
            )
        codes = (jnp.pad(c, row_padding(c.ndim, length - steps)) for c in (fields.k, fields.v))
        k_cache, v_cache = codes
        return dataclasses.replace(empty, k_cache=k_cache, v_cache=v_cache), fields.cost

    def saturation(self, lengths: ArrayLike) -> Saturation:
        """The share of the codes in use that lie at either end, -128 or 127, where values are cut.

        An occasional one is what calibration allows; much more says that the scales do not fit.
        Under `jax.experimental.checkify`, `update` itself reports codes that it saturates.

        It reads every row of every layer, also those that are not in use, once. Its temporaries
        are small.

        Args:
          lengths: [B] int32, the rows of each sequence that are in use.

        Returns:
          The shares of K and of V, each a float32 scalar, or [L] with layers.

        Raises:
          TypeError: `lengths` is not int32 or not 1-D.
          ValueError: `lengths` has another shape.
        """
        check_caches(self)
        batch, rows = self.k_cache.shape[-4:-2]
        lengths = check_int32("lengths", lengths, "B", (batch,))
        in_use = rows_below(lengths, rows)
        return shares_at_ends(self.k_cache, self.v_cache, in_use)

    def _indices(
        self, x: jax.Array, positions: ArrayLike, block_table: ArrayLike | None
    ) -> tuple[jax.Array, Literal["contiguous", "page"]]:
        if block_table is not None:
            raise TypeError(
                "`block_table` must be None for a KVCache: only a PagedKVCache has one."
            )
        return check_positions(positions, "B", x), "contiguous"
