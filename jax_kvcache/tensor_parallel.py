"""What users of several devices need: the tensor-parallel column order, and a shard's own slots."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_kvcache.ops.checks import INT32, check_array, check_axis_name, check_int
from jax_kvcache.ops.dequant_rope_quant_kvcache.checks import check_splits
from jax_kvcache.ops.explicit import automatically, spec_of
from jax_kvcache.ops.slots import INT32_MAX, shard_slots

# Smaller heads are those of toy models, which have few of them.
_USUAL_HEAD = 16


def _check_whole_heads(splits: tuple[int, ...], shards: int, head_dim: int | None) -> None:
    """Raises ValueError where a device would get a part of a head.

    The widths alone do not say how large a head is. Without `head_dim` this finds only what would
    be whole heads of a size that no model has.
    """
    if head_dim is not None:
        head_dim = check_int("head_dim", head_dim, 1)
        if any(split % head_dim for split in splits):
            raise ValueError(
                f"`head_dim` must divide each of `size_splits` = {splits}, got {head_dim}."
            )
        heads = [split // head_dim for split in splits]
        if any(number % shards for number in heads):
            raise ValueError(
                f"`shards` must divide the numbers of q, k and v heads, {heads} with `head_dim` = "
                f"{head_dim}, got {shards}. Share the heads among {math.gcd(*heads)} devices or a "
                "divisor of that, or repeat each kv head in the projection until there are enough."
            )
        return
    largest = splits[1] // shards
    if largest < _USUAL_HEAD and splits[0] // largest > 2 * largest:
        raise ValueError(
            f"`shards` must leave each device whole kv heads, got {shards}: with `size_splits` = "
            f"{splits} each would get {largest} columns of k, and heads of {largest} columns would "
            f"mean {splits[0] // largest} q heads. Use at most as many devices as there are kv "
            f"heads, or pass `head_dim` = {largest} if the heads are so small."
        )


def _column_order(width, size_splits, shards, head_dim) -> np.ndarray:
    splits = check_splits(size_splits)
    if min(splits) < 1 or sum(splits) != width:
        raise ValueError(
            f"`size_splits` must be three widths (q, k, v) that add up to {width}, the last "
            f"dimension of `w`, got {splits}."
        )
    shards = check_int("shards", shards)
    if shards < 1 or any(split % shards for split in splits):
        raise ValueError(f"`shards` must divide each of `size_splits` = {splits}, got {shards}.")
    _check_whole_heads(splits, shards, head_dim)
    blocks = np.split(np.arange(width), np.cumsum(splits)[:2])
    # [shards, each block's own columns]: device i gets q, k and v columns i
    return np.concatenate([b.reshape(shards, -1) for b in blocks], axis=1).reshape(-1)


def _permuted(w: jax.Array, order: np.ndarray) -> jax.Array:
    return automatically(lambda w: w[..., order], spec_of(w), w)


def interleave_qkv_for_tensor_parallel(
    w: ArrayLike, size_splits: Sequence[int], shards: int, *, head_dim: int | None = None
) -> jax.Array:
    """Orders the columns [q | k | v] so that each of `shards` equal parts is a [q | k | v] itself.

    For `jax.shard_map` only: with the projection's columns in this order, a plain PartitionSpec
    over them gives each device its own q, k and v heads, and nothing is communicated. Apply it to
    the weight, `weight_scale` and `bias` alike, once, when the weights are loaded.

    Pass the operator `qkv_shards=shards` then, which compares it with the mesh. In automatic and
    explicit mode the operator sees the whole x and the plain order is the right one; with
    `qkv_shards` an interleaved x is an error there, without it its results are wrong. The
    operator also takes x, `weight_scale` and `bias` as tuples (q, k, v), which need no order.

    Args:
      w: [..., H], H = sum(size_splits); the projection's weight or a vector over its columns.
      size_splits: (Nq*D, Nkv*D, Nkv*D), the widths of q, k and v.
      shards: number of devices that share the heads; divides each width into whole heads.
      head_dim: D, with which it is an error if a device gets a part of a head, as where there are
        more shards than kv heads. The widths do not say it: without it only parts of fewer than 16
        columns are found.

    Returns:
      [..., H], a permutation of the columns.

    Raises:
      TypeError: widths or `shards` that are not ints.
      ValueError: widths below 1, that do not add up to H, or that `shards` does not divide into
        whole heads.
    """
    w = jnp.asarray(w)
    return _permuted(w, _column_order(w.shape[-1], size_splits, shards, head_dim))


def deinterleave_qkv_for_tensor_parallel(
    w: ArrayLike, size_splits: Sequence[int], shards: int, *, head_dim: int | None = None
) -> jax.Array:
    """Undoes `interleave_qkv_for_tensor_parallel`; same arguments.

    Returns:
      [..., H] in the plain order [q | k | v].
    """
    w = jnp.asarray(w)
    return _permuted(w, np.argsort(_column_order(w.shape[-1], size_splits, shards, head_dim)))


def local_slots(indices: ArrayLike, rows: int, axis_name: str | tuple[str, ...]) -> jax.Array:
    """This device's part of page-mode slots, inside `jax.shard_map` over the cache's blocks.

    Args:
      indices: int32 slots of the whole cache.
      rows: rows of this device's shard of the cache, C1 * C2.
      axis_name: the mesh axis, or axes, that the blocks are sharded over.

    Returns:
      int32 slots of the shard, in the shape of `indices`; -1, which the operator skips, for a slot
      that is another device's or no slot at all.

    Raises:
      TypeError: `indices` is not an int32 array of 1 or 2 dimensions, `rows` is not an int, or
        `axis_name` is no string and no tuple of strings.
      ValueError: the devices together have more rows than int32 counts, or there is no such axis.
    """
    rows = check_int("rows", rows)
    check_array("indices", indices, INT32, (1, 2))
    axes = check_axis_name(axis_name)
    if not axes:
        raise TypeError(f"`axis_name` must name a mesh axis, got {axis_name!r}.")
    shards = lax.axis_size(axes)
    total = rows * shards
    if not 1 <= total <= INT32_MAX:
        raise ValueError(
            f"`rows` times the {shards} devices of '{axis_name}' must be in "
            f"[1, {INT32_MAX}], got {total}."
        )
    return shard_slots(jnp.asarray(indices), (rows,), (axes,), (shards,))
