"""The public function: argument checks, the canonical form, and what comes back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jax_kvcache.caches import KVCache, PagedKVCache
from jax_kvcache.caches.checks import layer_index
from jax_kvcache.ops.decode_attention.checks import Call, check_call
from jax_kvcache.ops.decode_attention.merge import merge_over_axes
from jax_kvcache.ops.decode_attention.primitive import bind
from jax_kvcache.ops.decode_attention.reference import AttentionOptions, Operands
from jax_kvcache.ops.implementation import Implementation
from jax_kvcache.ops.indexing import take_one
from jax_kvcache.ops.operands import absent, is_absent
from jax_kvcache.ops.slots import rebase, shard_positions, shard_slots


def decode_attention(
    q: jax.Array,
    cache: KVCache | PagedKVCache,
    lengths: ArrayLike | None = None,
    *,
    positions: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    block_table: ArrayLike | None = None,
    layer: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    implementation: Implementation = None,
) -> Any:
    """Attention of S new tokens per sequence over the rows of an int8 cache, read as it lies.

    `softmax(scale * q @ k.T) @ v`, with k and v = (code - offset) * scale of the channel; query
    head j reads cache head j // (Nq / Nkv). The arithmetic is float32 on every platform, except for
    more than 16 bfloat16 queries of a sequence on an NVIDIA GPU, see below. S is any number: one
    token of a decode step, a few speculative ones, a chunk of a prompt.

    Which rows a query sees is given by exactly one of `lengths` and `positions`:

    - `positions`: query s of sequence b sees the rows up to and including positions[b, s]. A
      negative position is padding: the query sees nothing and its result is zeros. This is the form
      for ragged batches, wherever the padding is.
    - `lengths`: **the number of rows that the last of the S queries sees**, so that query s sees
      rows < lengths - S + s + 1. **Every sequence has S new tokens then, and the last of them is
      the last row; a batch of prompts that are padded on the right needs `positions`.**

    For prompts of 5 and 8 tokens, padded to S = 8 and written to rows 0 and on:

        step = jnp.arange(8)
        positions = jnp.where(step < jnp.array([[5], [8]]), step, -1)
        out = decode_attention(q, cache, positions=positions)

    Rows, blocks and lengths outside the cache are not seen and never read. Under
    `jax.experimental.checkify` a query past the end is an error, and so is a block that a query
    needs and that is not there; with `return_lse` only the first, for parts that will be merged.

    What it costs: the reference reads the cache in chunks of rows, up to the last row that any
    sequence sees. Beside the results it takes one chunk of K and V in float32 and its scores: about
    1 MB on a CPU and 256 MB elsewhere, and never less than 128 rows of each sequence take. Queries
    go in tiles of 256. Neither the cache nor a layer is dequantised, gathered or copied as a whole.
    On an NVIDIA GPU more than 16 queries of bfloat16 go through cuDNN, with `implementation="xla"`
    too: over codes in float16, at most 256 MB of them, or as many rows of each sequence as queries
    where that is more, and with weights rounded to it. The largest error is about that of attention
    over a bfloat16 cache, or less. Queries of a sequence that follow each other, padded or not, and
    without a `window`, are fastest. `explain_attention` says whether a call goes there, and float32
    queries never do.

    Under `jax.vmap` a cache that is not mapped is shared, not copied. Over several devices it is
    computed where the cache is: shard B (or the blocks) and the heads; sharded rows and blocks
    merge by the log-sum-exp, with one maximum and one sum. Inside `jax.shard_map`, `axis_name` does
    that. `jax.jvp` gives derivatives by q, the scales, the offsets and the sinks, in all these
    places: the result is this call's, its derivative the reference's. There is no reverse mode.

    Args:
      q: [B, S, Nq, D] float16, bfloat16 or float32, the operator's q; Nq is a multiple of Nkv.
      cache: the cache that already holds the S new tokens' rows.
      lengths: [B] int32, see above; 0 gives zeros.
      positions: [B, S] int32, see above.
      axis_name: inside `jax.shard_map`, the mesh axis, or axes, over which the blocks of a
        `PagedKVCache` or the rows of a `KVCache` are sharded. Block numbers and positions are those
        of the whole cache; every device gets the whole result.
      block_table: [B, M] int32, for a `PagedKVCache` only: the block of rows m * block_size and
        on. Rows of a block outside [0, num_blocks) are not seen.
      layer: the layer to read, an int or an integer scalar; for a cache with layers only. A traced
        one that does not exist gives NaN.
      scale: factor of the scores; None is D ** -0.5.
      window: a query sees only the last `window` rows up to its own; None: all of them.
      soft_cap: scores become soft_cap * tanh(score / soft_cap); None: they stay.
      sinks: [Nq] float32, one learned logit per query head that takes part in the softmax and has
        no value.
      return_lse: whether the log-sum-exp of the scores comes back too, for `merge_attention`.
      implementation: None takes the platform's native target where there is one that can run the
        call, else the jax.numpy reference, with a warning if there is one that cannot. On a GPU
        the reference, which may call cuDNN, also runs every prefill (S > 16). "ffi" demands the
        native target and raises where it cannot be had; "xla" is the reference anywhere.
        `jax_kvcache.explain_attention` says which one a call gets, and why.

    Returns:
      [B, S, Nq, D] in the dtype of q. With `return_lse` a pair of that and lse, [B, S, Nq] float32:
      natural, -inf where a query sees nothing, without the sinks.

    Raises:
      TypeError: a dtype or rank is not as above, both or neither of `lengths` and `positions`, or
        an argument that does not go with this cache.
      ValueError: a shape or a value is not as above.
      NotImplementedError: `implementation="ffi"` where there is no native target.
    """
    return run(
        Call(
            q, cache, lengths, positions, axis_name, block_table, layer, scale, window, soft_cap,
            sinks, return_lse, implementation,
        )
    )  # fmt: skip


def run(call: Call) -> Any:
    """Checks a call and runs it."""
    operands, options, exists = canonical_operands(call)
    if options.axes:
        out, lse = _over_axes(operands, options)
    else:
        out, lse = bind(operands, options)
    if not isinstance(exists, bool):
        out = jnp.where(exists, out, jnp.asarray(jnp.nan, out.dtype))
        lse = jnp.where(exists, lse, jnp.nan)
    return (out, lse) if call.return_lse else out


def _over_axes(operands: Operands, options: AttentionOptions) -> Any:
    """Inside `jax.shard_map`: this device's part, merged with the others'."""
    q, sinks = operands.q, None if is_absent(operands.sinks) else operands.sinks
    part = operands._replace(q=q.astype(jnp.float32), sinks=absent())
    out, lse = bind(part, dataclasses.replace(options, return_lse=True))
    out, lse = merge_over_axes(out, lse, options.axes, sinks)
    return out.astype(q.dtype), lse


def canonical_operands(call: Call) -> tuple[Operands, AttentionOptions, jax.Array | bool]:
    """Checks a call and puts it in the primitive's form.

    Returns:
      The operands, the options, and whether the layer exists, as an array where it is traced.
    """
    consecutive = call.lengths is not None
    call = check_call(call)
    cache = call.cache
    at = layer_index(cache.layers, call.layer)
    is_contiguous = isinstance(cache, KVCache)
    blocks, R = cache.k_cache.shape[-4:-2]
    table, positions = call.block_table, call.positions
    axes = call.axis_name
    if is_contiguous:
        table = jnp.arange(call.q.shape[0], dtype=jnp.int32)[:, None]
        if axes:
            positions = shard_positions(positions, R, axes)
    elif axes:
        table = shard_slots(table, (blocks,), (axes,), (lax.axis_size(axes),))
    if at is not None:
        table = rebase(table, jnp.where(at.exists, at.number, jnp.int32(-1)), blocks)

    def of_layer(parameter: jax.Array | None) -> jax.Array:
        if parameter is None:
            return absent()
        return parameter if at is None else take_one(parameter, at.number)

    static = isinstance(call.scale, jax.Array)
    scale_k = of_layer(cache.scale_k)
    operands = Operands(
        q=jnp.asarray(call.q),
        k_cache=cache.k_cache,
        v_cache=cache.v_cache,
        table=table,
        positions=positions,
        scale_k=scale_k * call.scale.astype(jnp.float32) if static else scale_k,
        scale_v=of_layer(cache.scale_v),
        offset_k=of_layer(cache.offset_k),
        offset_v=of_layer(cache.offset_v),
        sinks=absent() if call.sinks is None else jnp.asarray(call.sinks),
    )
    options = AttentionOptions(
        implementation=call.implementation,
        scale=1.0 if static else float(call.scale),
        window=call.window,
        soft_cap=call.soft_cap,
        return_lse=bool(call.return_lse),
        contiguous=is_contiguous,
        consecutive=consecutive,
        partial=bool(call.return_lse),
        axes=axes,
    )
    return operands, options, at is None or at.exists
