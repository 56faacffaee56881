"""A decoder's forward pass: with the int8 cache, with a float cache, and without a cache."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_kvcache import backends
from jax_kvcache.caches import KVCache, PagedKVCache
from jax_kvcache.model.float_cache import FloatCache, attention, rotate
from jax_kvcache.model.linear import FloatLinear, Projected, matmul, per_column
from jax_kvcache.model.places import check_tokens, places, positions_of_tokens
from jax_kvcache.model.weights import Config, Layer, Model
from jax_kvcache.ops.decode_attention.api import decode_attention
from jax_kvcache.ops.implementation import Implementation
from jax_kvcache.rope import rope_tables

Cache = TypeVar("Cache", bound=KVCache | PagedKVCache | FloatCache)
KvMap = Callable[[int, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def forward(
    model: Model,
    tokens: ArrayLike,
    cache: Cache,
    positions: ArrayLike,
    *,
    block_table: ArrayLike | None = None,
    rows: int | None = None,
    table_dtype: DTypeLike | None = None,
    implementation: Implementation = None,
) -> tuple[jax.Array, Cache]:
    """Reads S more tokens of each text; every layer's k and v go through the operator to the cache.

    Args:
      model: see `jax_kvcache.checkpoints.load`.
      tokens: [B, S] int32, or a NumPy array of other integers.
      cache: see `new_cache`, or a `PagedKVCache` with layers; it holds the tokens before. Donate it
        to stay in place.
      positions: [B] int32, the position of the first of the S tokens. For a `PagedKVCache` [B, S]
        int32, the position of each; a negative one is padding, whose logits mean nothing.
      block_table: [B, M] int32 for a `PagedKVCache`, see `BlockAllocator.block_table`; None for
        the other caches. M, the allocator's `columns`, decides `rows` where that is None.
      rows: the longest text that RoPE of the types dynamic and longrope is made for; None is the
        rows that a text can have: C2, and M * block_size in a paged cache. Every step of a text
        needs the same number, so give it where M may change: with another one, q has other
        frequencies than the k that is in the cache, and the logits are wrong. Static.
      table_dtype: dtype of the RoPE tables, and so of q and of a float x; None is float32, and
        bfloat16 where JAX's default device is an Ascend NPU, whose operator takes no float32.
      implementation: of the write; "xla" is that of attention too.

    Returns:
      logits [B, S, vocab] float32 of the token after each, and the cache.

    Raises:
      TypeError: a wrong dtype or rank, no cache, a `PagedKVCache` without a block table, or another
        cache with one.
      ValueError: a wrong shape, `rows` below 1, or a cache of other layers or heads than the
        model's; see also `update` of the cache.
    """
    config, table_dtype = model.config, table_dtype or default_table_dtype()
    at = places(config, tokens, cache, positions, block_table, rows)
    cos, sin = _tables(config, at.of_tokens, at.rows, table_dtype)
    x = _embed(model, at.tokens)
    for index, layer in enumerate(model.layers):
        projected = _project_qkv(config, layer, x, table_dtype)
        window = config.windows[index]
        if isinstance(cache, FloatCache):
            q, k, v = rotate(
                projected, cos, sin, config.n_kv_heads, config.head_dim, implementation
            )
            cache = cache.update(k, v, at.positions, index)
            attended = attention(q, cache.k[index], cache.v[index], at.positions, window)
        else:
            q, written = cache.update(
                projected.x,
                cos,
                sin,
                at.positions,
                weight_scale=projected.weight_scale,
                activation_scale=projected.activation_scale,
                bias=projected.bias,
                block_table=at.block_table,
                layer=index,
                implementation=implementation,
            )
            attended = decode_attention(
                q.astype(jnp.float32),
                written,
                positions=at.of_tokens,
                block_table=at.block_table,
                layer=index,
                window=window,
                # "ffi" is a demand on the write: not every device that has it has attention.
                implementation="xla" if implementation == "xla" else None,
            )
            cache = cast(Cache, written)
        x = _finish_layer(config, layer, x, attended)
    return _logits(model, x), cache


class FloatForward(NamedTuple):
    """What `forward_float` returns.

    Attributes:
      logits: [B, S, vocab] float32 of the token after each.
      q: [L, B, S, Nq, D] in the dtype of the RoPE tables, after RoPE.
      k: [L, B, S, Nkv, D] that attention read, after RoPE.
      v: [L, B, S, Nkv, D] that attention read.
    """

    logits: jax.Array
    q: jax.Array
    k: jax.Array
    v: jax.Array


def forward_float(
    model: Model,
    tokens: ArrayLike,
    *,
    rows: int | None = None,
    table_dtype: DTypeLike | None = None,
    kv_map: KvMap | None = None,
) -> FloatForward:
    """Reads whole texts without a cache: the same model, its k and v never quantised.

    Args:
      model: see `jax_kvcache.checkpoints.load`.
      tokens: [B, S] as in `forward`, from position 0.
      rows: the longest text that RoPE of the types dynamic and longrope is made for, at least S;
        None is S. Give the rows of the cache in which k and v will be. Static.
      table_dtype: as in `forward`; also the dtype of k and v.
      kv_map: (layer, k, v) -> (k, v), what a cache of another format would give back; k and v are
        [B, S, Nkv, D].

    Returns:
      The logits, and what attention read.

    Raises:
      TypeError: `tokens` has a wrong dtype or rank.
      ValueError: `rows` is below S.
    """
    config, table_dtype = model.config, table_dtype or default_table_dtype()
    tokens = check_tokens(tokens)
    batch, length = tokens.shape
    rows = length if rows is None else rows
    if rows < length:
        raise ValueError(f"`rows` must be at least S = {length}, got {rows}.")
    positions = jnp.zeros((batch,), jnp.int32)
    cos, sin = _tables(config, positions_of_tokens(positions, length), rows, table_dtype)
    x, read = _embed(model, tokens), []
    for index, layer in enumerate(model.layers):
        projected = _project_qkv(config, layer, x, table_dtype)
        q, k, v = rotate(projected, cos, sin, config.n_kv_heads, config.head_dim)
        if kv_map is not None:
            k, v = kv_map(index, k, v)
        attended = attention(q, k, v, positions, config.windows[index])
        x = _finish_layer(config, layer, x, attended)
        read.append((q, k, v))
    return FloatForward(_logits(model, x), *map(jnp.stack, zip(*read, strict=True)))


def default_table_dtype() -> DTypeLike:
    """float32, or bfloat16 where JAX's default device is an Ascend NPU."""
    backend = backends.find(jax.default_backend())
    on_ascend = backend is not None and backend.name == "ascend"
    return jnp.bfloat16 if on_ascend else jnp.float32


def _tables(config: Config, positions: jax.Array, rows: int, dtype: DTypeLike):
    """cos and sin of tokens at `positions` [B, S]; `rows` is the longest text."""
    return rope_tables(
        positions, config.head_dim, dtype=dtype, rope_parameters=config.rope, seq_len=rows
    )


def _embed(model: Model, tokens: jax.Array) -> jax.Array:
    return model.embed[tokens].astype(jnp.float32)


def _rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return normed * per_column(gain, x)


def passes_floats(layer: Layer) -> bool:
    """Whether a layer hands the operator a float x.

    Norms of the heads come before RoPE, where the operator has no place for them, and layers of
    different kinds have no common scales.
    """
    fused = len(layer.qkv) == 1 and layer.q_norm is None
    return not fused or isinstance(layer.qkv[0], FloatLinear)


def _project_qkv(config: Config, layer: Layer, x: jax.Array, table_dtype: DTypeLike) -> Projected:
    """q, k and v of x [B, S, d_model] as the operator takes them: [B, S, H]."""
    h = _rms_norm(x, layer.norm1, config.norm_eps)
    parts = [linear.project(h) for linear in layer.qkv]
    if not passes_floats(layer):
        return parts[0]
    y = jnp.concatenate([part.dequantize() for part in parts], axis=-1)
    heads = y.reshape(*y.shape[:-1], -1, config.head_dim)
    q, k, v = jnp.split(heads, [config.n_q_heads, config.n_q_heads + config.n_kv_heads], axis=-2)
    if layer.q_norm is not None:
        q = _rms_norm(q, layer.q_norm, config.norm_eps)
    if layer.k_norm is not None:
        k = _rms_norm(k, layer.k_norm, config.norm_eps)
    return Projected(jnp.concatenate([q, k, v], axis=-2).reshape(y.shape).astype(table_dtype))


def _finish_layer(config: Config, layer: Layer, x: jax.Array, attended: jax.Array) -> jax.Array:
    """The output projection and the MLP, each added to the residual x [B, S, d_model]."""
    x = x + layer.o(attended.astype(jnp.float32).reshape(*x.shape[:-1], -1))
    h = _rms_norm(x, layer.norm2, config.norm_eps)
    return x + layer.down(jax.nn.silu(layer.gate(h)) * layer.up(h))


def _logits(model: Model, x: jax.Array) -> jax.Array:
    h = _rms_norm(x, model.norm_f, model.config.norm_eps)
    return matmul(h, model.embed) if model.head is None else model.head(h)
