"""A model's logits and cache over one text: read at once, and token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvcache.model import forward, new_cache


@functools.cache
def step(implementation):
    """The jitted forward pass; float32 tables, as the expected logits were made."""
    return jax.jit(
        functools.partial(forward, table_dtype=jnp.float32, implementation=implementation)
    )


def at_once(model, ids, implementation=None):
    """[S, vocab] logits and the cache."""
    tokens, start = jnp.asarray(ids, jnp.int32)[None], jnp.zeros(1, jnp.int32)
    logits, cache = step(implementation)(model, tokens, new_cache(model, 1, len(ids)), start)
    return np.asarray(logits[0], np.float64), cache


def token_by_token(model, ids, implementation=None):
    """[S, vocab] logits and the cache."""
    cache, logits = new_cache(model, 1, len(ids)), []
    for i, token in enumerate(np.asarray(ids, np.int32)):
        one, cache = step(implementation)(
            model, jnp.full((1, 1), token), cache, jnp.full(1, i, jnp.int32)
        )
        logits.append(np.asarray(one[0, 0], np.float64))
    return np.stack(logits), cache


def largest_error(logits, expected):
    """As a share of the largest expected logit."""
    return np.abs(logits - expected).max() / np.abs(expected).max()
