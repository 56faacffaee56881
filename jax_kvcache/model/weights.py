"""A decoder's configuration and weights, as pytrees, and an empty cache for it."""

import dataclasses

import jax

from jax_kvcache.caches import KVCache, PagedKVCache
from jax_kvcache.model.float_cache import FloatCache
from jax_kvcache.model.linear import Linear
from jax_kvcache.rope_parameters import RopeParameters


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder's sizes, static under jit.

    Attributes:
      vocab: entries of the vocabulary.
      d_model: width of the residual stream.
      n_layers: L.
      n_q_heads: Nq.
      n_kv_heads: Nkv.
      head_dim: D.
      d_ff: width of the MLP.
      norm_eps: added to the mean square in every RMSNorm.
      context: the longest text that it was made for, in tokens.
      rope: the rotary position embedding.
      windows: of each layer, how many of the last rows attention sees; None for all.
      end_tokens: tokens that end a text.
    """

    vocab: int
    d_model: int
    n_layers: int
    n_q_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float
    context: int
    rope: RopeParameters
    windows: tuple[int | None, ...]
    end_tokens: tuple[int, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer's weights.

    Attributes:
      norm1: [d_model] float32, gain of the RMSNorm before attention.
      qkv: one linear layer for q, k and v, [H, d_model], H = (Nq + 2*Nkv) * D; or one for each,
        where they are quantised in different ways.
      q_norm: [D] float32, gain of the RMSNorm of each q head before RoPE, or None.
      k_norm: as q_norm, of each k head.
      o: [d_model, Nq*D].
      norm2: [d_model] float32, gain of the RMSNorm before the MLP.
      gate: [d_ff, d_model].
      up: [d_ff, d_model].
      down: [d_model, d_ff].
    """

    norm1: jax.Array
    qkv: tuple[Linear, ...]
    q_norm: jax.Array | None
    k_norm: jax.Array | None
    o: Linear
    norm2: jax.Array
    gate: Linear
    up: Linear
    down: Linear


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder, a pytree: Llama, Mistral, Qwen2 or Qwen3.

    Layers are separate, so that they may be quantised differently, and because a scan over stacked
    layers copies every weight that it slices: a step over int8 layers took twice as long, one over
    float32 layers six times.

    Attributes:
      embed: [vocab, d_model] float32 or bfloat16.
      layers: the layers.
      norm_f: [d_model] float32, gain of the last RMSNorm.
      head: [vocab, d_model], from the last norm to the logits; None where that is `embed`.
      cache_params: scale_k and scale_v, and offset_k and offset_v if there are offsets:
        [L, Nkv, D] float32; None where the cache is to be float.
      config: the sizes; static.
    """

    embed: jax.Array
    layers: tuple[Layer, ...]
    norm_f: jax.Array
    head: Linear | None
    cache_params: dict[str, jax.Array] | None
    config: Config = dataclasses.field(metadata={"static": True})


def new_cache(model: Model, batch: int, length: int | None = None) -> KVCache | FloatCache:
    """An empty cache with all layers in one array: int8 if the model has scales for it, else float.

    Args:
      model: see `Model`.
      batch: texts.
      length: rows per text; None is the model's context.
    """
    config = model.config
    rows = config.context if length is None else length
    layers, heads, head_dim = config.n_layers, config.n_kv_heads, config.head_dim
    if model.cache_params is None:
        return FloatCache.create((layers, batch, rows, heads, head_dim))
    q_heads = config.n_q_heads
    params = model.cache_params
    return KVCache.create(
        batch, rows, heads, head_dim, layers=layers, num_q_heads=q_heads, **params
    )


def new_paged_cache(model: Model, num_blocks: int, block_size: int) -> PagedKVCache:
    """An empty paged cache with all layers in one array, for `forward` with a block table.

    Args:
      model: see `Model`.
      num_blocks: blocks, shared by all texts.
      block_size: rows per block.

    Raises:
      ValueError: the model has no scales.
    """
    config, params = model.config, model.cache_params
    if params is None:
        raise ValueError("`model` must have `cache_params`, got None: calibrate it first.")
    heads, head_dim, q_heads = config.n_kv_heads, config.head_dim, config.n_q_heads
    return PagedKVCache.create(
        num_blocks, block_size, heads, head_dim, layers=config.n_layers, num_q_heads=q_heads,
        **params,
    )  # fmt: skip
