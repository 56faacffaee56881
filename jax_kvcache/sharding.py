"""What users of several devices need: the tensor-parallel column order, and a shard's own slots."""

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_kvcache._layout import own_slots


def _column_order(width, size_splits, shards) -> np.ndarray:
    splits = tuple(size_splits)
    if len(splits) != 3 or sum(splits) != width:
        raise ValueError(
            f"`size_splits` must be three widths (q, k, v) that add up to {width}, the last "
            f"dimension of `w`, got {splits}."
        )
    if shards < 1 or any(split % shards for split in splits):
        raise ValueError(f"`shards` must divide each of `size_splits` = {splits}, got {shards}.")
    blocks = np.split(np.arange(width), np.cumsum(splits)[:2])
    # [shards, each block's own columns]: device i gets q, k and v columns i
    return np.concatenate([b.reshape(shards, -1) for b in blocks], axis=1).reshape(-1)


def interleave_qkv_for_tensor_parallel(
    w: ArrayLike, size_splits: Sequence[int], shards: int
) -> jax.Array:
    """Orders the columns [q | k | v] so that each of `shards` equal parts is a [q | k | v] itself.

    For `jax.shard_map` only: with the projection's columns in this order, a plain PartitionSpec
    over them gives each device its own q, k and v heads, and nothing is communicated. Apply it to
    the weight, `weight_scale` and `bias` alike, once, when the weights are loaded.

    In automatic and explicit mode the operator sees the whole x and the plain order is the right
    one; an interleaved x would give wrong results there without an error.

    Args:
      w: [..., H], H = sum(size_splits); the projection's weight or a vector over its columns.
      size_splits: (Nq*D, Nkv*D, Nkv*D), the widths of q, k and v.
      shards: number of devices that share the heads; divides each width into whole heads.

    Returns:
      [..., H], a permutation of the columns.

    Raises:
      ValueError: widths that do not add up to H, or that `shards` does not divide.
    """
    w = jnp.asarray(w)
    return w[..., _column_order(w.shape[-1], size_splits, shards)]


def deinterleave_qkv_for_tensor_parallel(
    w: ArrayLike, size_splits: Sequence[int], shards: int
) -> jax.Array:
    """Undoes `interleave_qkv_for_tensor_parallel`; same arguments.

    Returns:
      [..., H] in the plain order [q | k | v].
    """
    w = jnp.asarray(w)
    return w[..., np.argsort(_column_order(w.shape[-1], size_splits, shards))]


def local_slots(indices: ArrayLike, rows: int, axis_name: Hashable) -> jax.Array:
    """This device's part of page-mode slots, inside `jax.shard_map` over the cache's blocks.

    Args:
      indices: int32 slots of the whole cache.
      rows: rows of this device's shard of the cache, C1 * C2.
      axis_name: the mesh axis that the blocks are sharded over.

    Returns:
      int32 slots of the shard, in the shape of `indices`; -1, which the operator skips, for a slot
      that is another device's or no slot at all.
    """
    return own_slots(jnp.asarray(indices), (rows,), (axis_name,), (lax.axis_size(axis_name),))
