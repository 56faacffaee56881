"""What approximate k and v do to attention."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_kvcache.export import register_namedtuple_serialization
from jax_kvcache.numerics.measures import check_alike, sqnr
from jax_kvcache.ops.explicit import automatically


@register_namedtuple_serialization
class AttentionError(NamedTuple):
    """Errors of attention over approximate k and v.

    Attributes:
      weights: [T, Nq] total variation distance of each query's attention weights, in [0, 1].
      output_sqnr: signal-to-noise ratio of the attention output in decibels.
    """

    weights: jax.Array
    output_sqnr: jax.Array


def _causal_attention(q, k, v):
    """Weights [Nkv, group, T, T] and output [T, Nkv, group, D], in float32."""
    num_kv_heads, head_dim = k.shape[-2:]
    q = q.astype(jnp.float32).reshape(len(q), num_kv_heads, -1, head_dim)
    scores = jnp.einsum("tngd,snd->ngts", q, k.astype(jnp.float32)) * head_dim**-0.5
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf), axis=-1)
    return weights, jnp.einsum("ngts,snd->tngd", weights, v.astype(jnp.float32))


def attention_error(q, k, v, k_approximation, v_approximation) -> AttentionError:
    """Causal attention over the approximations against attention over k and v.

    Args:
      q: [T, Nq, D], Nq a multiple of Nkv; query head j reads kv head j // (Nq / Nkv).
      k, v: [T, Nkv, D], the float cache.
      k_approximation, v_approximation: [T, Nkv, D], as read from a quantised cache.

    Raises:
      ValueError: a shape is not as above.
    """
    T, num_kv_heads, D = k.shape
    if q.ndim != 3 or (q.shape[0], q.shape[2]) != (T, D) or q.shape[1] % num_kv_heads:
        raise ValueError(
            f"`q` must have shape [T, Nq, D] = [{T}, a multiple of {num_kv_heads}, {D}], "
            f"got {list(q.shape)}."
        )
    check_alike("v", v, "k", k)
    check_alike("k_approximation", k_approximation, "k", k)
    check_alike("v_approximation", v_approximation, "v", v)
    whole: Any = jax.sharding.PartitionSpec()
    return automatically(
        _attention_error, AttentionError(whole, whole), q, k, v, k_approximation, v_approximation
    )


def _attention_error(q, k, v, k_approximation, v_approximation) -> AttentionError:
    weights, output = _causal_attention(q, k, v)
    approximate_weights, approximate_output = _causal_attention(q, k_approximation, v_approximation)
    distance = jnp.sum(jnp.abs(weights - approximate_weights), -1) / 2  # [Nkv, group, T]
    return AttentionError(
        jnp.moveaxis(distance, -1, 0).reshape(len(q), -1), sqnr(output, approximate_output)
    )
