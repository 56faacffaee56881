"""The demo model's forward pass: with the int8 cache, and with a float cache to compare it to."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_kvcache.caches import KVCache
from jax_kvcache.model.weights import Config, Model
from jax_kvcache.ops.decode_attention.api import decode_attention
from jax_kvcache.ops.dequant_rope_quant_kvcache.api import dequant_rope_quant_kvcache
from jax_kvcache.ops.implementation import Implementation
from jax_kvcache.rope import rope_tables

Weights = dict[str, jax.Array]


def forward(
    model: Model,
    tokens: jax.Array,
    cache: KVCache,
    positions: jax.Array,
    *,
    table_dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation = None,
) -> tuple[jax.Array, KVCache]:
    """Reads S more bytes of each text; every layer's k and v go through the operator to the cache.

    Args:
      model: see `load_model`.
      tokens: [B, S] int32 bytes.
      cache: see `new_cache`; it holds the bytes before. Donate it to stay in place.
      positions: [B] int32, the position of the first of the S bytes.
      table_dtype: dtype of the RoPE tables, and so of q.
      implementation: the operator's.

    Returns:
      logits [B, S, vocab] float32 of the byte after each, and the cache.
    """
    config = model.config
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    cos, sin = rope_tables(
        positions[:, None] + steps[None, :], config.head_dim, config.rope_theta, table_dtype
    )

    def layer(carry, inputs):
        x, cache = carry
        index, weights = inputs
        accumulators, activation_scale = _project_qkv(config, x, weights)
        q, cache = cache.update(
            accumulators,
            cos,
            sin,
            positions,
            weight_scale=weights["wqkv_scale"],
            activation_scale=activation_scale,
            bias=weights["bqkv"],
            layer=index,
            implementation=implementation,
        )
        lengths = positions + tokens.shape[1]
        attended = decode_attention(q.astype(jnp.float32), cache, lengths, layer=index)
        return (_finish_layer(config, x, attended, weights), cache), None

    indices = jnp.arange(config.n_layers, dtype=jnp.int32)
    carry = (model.embed[tokens], cache)
    (x, cache), _ = jax.lax.scan(layer, carry, (indices, model.layers))
    return _logits(model, x), cache


class FloatForward(NamedTuple):
    """What `forward_float` returns.

    Attributes:
      logits: [B, S, vocab] float32 of the byte after each.
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
    tokens: jax.Array,
    *,
    table_dtype: DTypeLike = jnp.bfloat16,
    kv_map: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None,
) -> FloatForward:
    """Reads whole texts with a float cache: the same model, its k and v never quantised.

    Args:
      model: see `load_model`.
      tokens: [B, S] int32 bytes, from position 0.
      table_dtype: dtype of the RoPE tables, and so of q, k and v.
      kv_map: (layer, k, v) -> (k, v), what a cache of another format would give back; layer is a
        traced int32 scalar, k and v are [B, S, Nkv, D].

    Returns:
      The logits, and what attention read.
    """
    config = model.config
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], (batch, length))
    cos, sin = rope_tables(positions, config.head_dim, config.rope_theta, table_dtype)
    causal = positions[0][:, None] >= positions[0][None, :]
    shape = (batch, 1, config.n_kv_heads, config.head_dim)

    def layer(x, inputs):
        index, weights = inputs
        accumulators, activation_scale = _project_qkv(config, x, weights)
        # The operator is here for q, k and v only: negative indices write nothing.
        unused = jnp.ones(shape[2:], jnp.float32)
        q, k, v, *_ = dequant_rope_quant_kvcache(
            accumulators,
            cos,
            sin,
            jnp.zeros(shape, jnp.int8),
            jnp.zeros(shape, jnp.int8),
            jnp.full((batch,), -1, jnp.int32),
            unused,
            unused,
            weight_scale=weights["wqkv_scale"],
            activation_scale=activation_scale,
            bias=weights["bqkv"],
            kv_output=True,
        )
        assert k is not None
        assert v is not None
        if kv_map is not None:
            k, v = kv_map(index, k, v)
        heads = (batch, length, config.n_kv_heads, -1, config.head_dim)
        scores = jnp.einsum(
            "bsngd,bcnd->bngsc", q.astype(jnp.float32).reshape(heads), k.astype(jnp.float32)
        )
        scores = jnp.where(causal, scores * config.head_dim**-0.5, -jnp.inf)
        attended = jnp.einsum(
            "bngsc,bcnd->bsngd", jax.nn.softmax(scores, axis=-1), v.astype(jnp.float32)
        )
        return _finish_layer(config, x, attended, weights), (q, k, v)

    indices = jnp.arange(config.n_layers, dtype=jnp.int32)
    x, qkv = jax.lax.scan(layer, model.embed[tokens], (indices, model.layers))
    return FloatForward(_logits(model, x), *qkv)


def _rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * gain


def _project_qkv(config: Config, x: jax.Array, weights: Weights) -> tuple[jax.Array, jax.Array]:
    """W8A8: int32 accumulators [B, S, H], and the activations' scale per token, [B, S]."""
    h = _rms_norm(x, weights["norm1"], config.norm_eps)
    scale = jnp.max(jnp.abs(h), axis=-1) / 127
    codes = jnp.rint(h / scale[..., None]).astype(jnp.int8)
    accumulators = jax.lax.dot_general(
        codes, weights["wqkv"], (((2,), (0,)), ((), ())), preferred_element_type=jnp.int32
    )
    return accumulators, scale


def _finish_layer(config: Config, x: jax.Array, attended: jax.Array, weights: Weights) -> jax.Array:
    """The output projection and the MLP, each added to the residual x [B, S, d_model]."""
    x = x + attended.reshape(x.shape) @ weights["wo"]
    h = _rms_norm(x, weights["norm2"], config.norm_eps)
    return x + (jax.nn.silu(h @ weights["wgate"]) * (h @ weights["wup"])) @ weights["wdown"]


def _logits(model: Model, x: jax.Array) -> jax.Array:
    return _rms_norm(x, model.norm_f, model.config.norm_eps) @ model.embed.T
