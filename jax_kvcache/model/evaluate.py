"""Negative log-likelihood of texts, with the int8 cache and with a float cache."""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvcache.model.forward import forward, forward_float
from jax_kvcache.model.weights import Model, new_cache
from jax_kvcache.ops.implementation import Implementation

BATCH = 16  # windows that are read together


class Windows(NamedTuple):
    """Texts cut into windows that do not overlap, in batches; positions start from 0 in each."""

    tokens: np.ndarray  # [N, batch, context] int32, zeros past the end of a window
    targets: np.ndarray  # [N, batch] int32, tokens to predict: the window's length less 1


def cut_windows(
    texts: Iterable[bytes | Sequence[int] | np.ndarray], context: int, batch: int = BATCH
) -> Windows:
    """Cuts every text for itself; a last window of 1 token has no target and is dropped.

    Args:
      texts: the texts, of bytes or tokens.
      context: tokens per window.
      batch: windows that are read together.
    """
    pieces = [t[i : i + context] for t in texts for i in range(0, len(t), context)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    pieces += [b""] * (-len(pieces) % batch)
    tokens = np.zeros((len(pieces), context), np.int32)
    for row, piece in zip(tokens, pieces, strict=True):
        row[: len(piece)] = list(piece)
    targets = np.array([max(len(piece) - 1, 0) for piece in pieces], np.int32)
    return Windows(tokens.reshape(-1, batch, context), targets.reshape(-1, batch))


def window_nll(logits: jax.Array, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log-likelihood of each window's targets, summed, in nats.

    Args:
      logits: [B, S, vocab] float32 of the token after each.
      tokens: [B, S] int32.
      targets: [B] int32, how many tokens to count, from the second on.

    Returns:
      [B] float32.
    """
    log_p = jax.nn.log_softmax(logits[:, :-1])
    nll = -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=2)[..., 0]
    counted = jnp.arange(nll.shape[1], dtype=jnp.int32)[None, :] < targets[:, None]
    return jnp.where(counted, nll, 0.0).sum(axis=1)


@functools.partial(jax.jit, static_argnames="implementation")
def nll_int8_cache(
    model: Model, tokens: jax.Array, targets: jax.Array, *, implementation: Implementation = None
) -> jax.Array:
    """`window_nll` of windows that attention reads back from the int8 cache: [B] float32."""
    cache, start = new_cache(model, *tokens.shape), jnp.zeros(tokens.shape[:1], jnp.int32)
    logits, _ = forward(model, tokens, cache, start, implementation=implementation)
    return window_nll(logits, tokens, targets)


@jax.jit
def nll_float_cache(model: Model, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    """`window_nll` of windows whose k and v were never quantised: [B] float32."""
    logits = forward_float(model, tokens).logits
    return window_nll(logits, tokens, targets)
