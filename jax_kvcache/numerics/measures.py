"""What quantisation costs: errors of the values, of attention, and of what a model predicts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_kvcache.export import (
    register_namedtuple_serialization,
)
from jax_kvcache.ops.checks import check_shape
from jax_kvcache.ops.explicit import automatically


def decibels(signal: jax.Array, noise: jax.Array) -> jax.Array:
    """10 * log10(signal / noise) of two powers; inf where there is no noise, NaN without both."""
    return 10 * jnp.log10(signal / noise)


def _check_alike(name: str, value: jax.Array, of_name: str, of: jax.Array) -> None:
    """Raises ValueError unless two arrays have one shape: broadcasting would compare others."""
    if value.shape != of.shape:
        raise ValueError(
            f"`{name}` must have the shape of `{of_name}`, {list(of.shape)}, "
            f"got {list(value.shape)}."
        )


def sqnr(
    values: jax.Array, approximation: jax.Array, axis: int | tuple[int, ...] | None = None
) -> jax.Array:
    """Signal-to-quantisation-noise ratio in decibels, over `axis` (all by default).

    Raises:
      ValueError: the two arrays differ in shape.
    """
    _check_alike("approximation", approximation, "values", values)
    values = values.astype(jnp.float32)
    noise = values - approximation
    return decibels(jnp.sum(values * values, axis), jnp.sum(noise * noise, axis))


@register_namedtuple_serialization
class AttentionError(NamedTuple):
    """Errors of attention over approximate k and v.

    Attributes:
      weights: [T, Nq] total variation distance of each query's attention weights, in [0, 1].
      output_sqnr: signal-to-noise ratio of the attention output in decibels.
    """

    weights: jax.Array
    output_sqnr: jax.Array


def _causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights [Nkv, group, T, T] and output [T, Nkv, group, D], in float32."""
    num_kv_heads, head_dim = k.shape[-2:]
    q = q.astype(jnp.float32).reshape(len(q), num_kv_heads, -1, head_dim)
    scores = jnp.einsum("tngd,snd->ngts", q, k.astype(jnp.float32)) * head_dim**-0.5
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf), axis=-1)
    return weights, jnp.einsum("ngts,snd->tngd", weights, v.astype(jnp.float32))


def attention_error(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_approximation: jax.Array,
    v_approximation: jax.Array,
) -> AttentionError:
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
    _check_alike("v", v, "k", k)
    _check_alike("k_approximation", k_approximation, "k", k)
    _check_alike("v_approximation", v_approximation, "v", v)
    whole: Any = jax.sharding.PartitionSpec()
    return automatically(
        _attention_error, AttentionError(whole, whole), q, k, v, k_approximation, v_approximation
    )


def _attention_error(
    q: jax.Array, k: jax.Array, v: jax.Array, k_approximation: jax.Array, v_approximation: jax.Array
) -> AttentionError:
    weights, output = _causal_attention(q, k, v)
    approximate_weights, approximate_output = _causal_attention(q, k_approximation, v_approximation)
    distance = jnp.sum(jnp.abs(weights - approximate_weights), -1) / 2  # [Nkv, group, T]
    return AttentionError(
        jnp.moveaxis(distance, -1, 0).reshape(len(q), -1), sqnr(output, approximate_output)
    )


def token_agreement(logits: jax.Array, baseline: jax.Array) -> jax.Array:
    """Share of positions where both logits [..., vocabulary] have the same largest entry.

    Raises:
      ValueError: the two arrays differ in shape.
    """
    _check_alike("logits", logits, "baseline", baseline)
    return jnp.mean(jnp.argmax(logits, -1) == jnp.argmax(baseline, -1), dtype=jnp.float32)


def divergence(logits: jax.Array, baseline: jax.Array) -> jax.Array:
    """Kullback-Leibler divergence from the baseline's predictions, in nats per position.

    It is the increase of the nll on text drawn from the baseline model itself, in expectation: it
    has no first-order term in the error, so it ranks small errors that the nll of a given text,
    where errors help about as often as they hurt, does not.

    Args:
      logits, baseline: [..., vocabulary].

    Returns:
      [...] float32.

    Raises:
      ValueError: the two arrays differ in shape.
    """
    _check_alike("logits", logits, "baseline", baseline)
    log_p, log_q = jax.nn.log_softmax(baseline), jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)


@register_namedtuple_serialization
class PairedDifference(NamedTuple):
    """Mean of value - baseline over pairs, and its standard error."""

    mean: jax.Array
    standard_error: jax.Array


def paired_difference(values: ArrayLike, baseline: ArrayLike) -> PairedDifference:
    """Compares two runs window by window, which takes out how hard each window is.

    Args:
      values: [W] one number per window, such as its mean nll.
      baseline: [W] the same windows with a float cache.
    """
    values, baseline = jnp.asarray(values), jnp.asarray(baseline)
    if values.ndim != 1:
        raise TypeError(f"`values` must be 1-D, got {values.ndim}-D {list(values.shape)}.")
    check_shape("baseline", baseline, ("W", values.shape))
    difference = values - baseline
    return PairedDifference(
        jnp.mean(difference), jnp.std(difference, ddof=1) / len(difference) ** 0.5
    )
