"""Generation: one jitted step per token, the cache donated from each to the next."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvcache.caches import KVCache
from jax_kvcache.model.float_cache import FloatCache
from jax_kvcache.model.forward import Cache, forward, forward_float
from jax_kvcache.model.places import cache_rows
from jax_kvcache.model.weights import Model
from jax_kvcache.ops.implementation import Implementation


class Step(NamedTuple):
    """One token of the text: what was written, and what the greedy choice was."""

    token: jax.Array  # [B] int32
    greedy: jax.Array  # [B] int32


@functools.partial(jax.jit, donate_argnames="cache", static_argnames="implementation")
def read(
    model: Model,
    cache: Cache,
    tokens: jax.Array,
    positions: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    *,
    implementation: Implementation = None,
) -> tuple[Step, Cache]:
    """Reads S tokens of each text and chooses the next one.

    Args:
      model: see `jax_kvcache.checkpoints.load`.
      cache: see `new_cache`; donated.
      tokens: [B, S] int32.
      positions: [B] int32, the position of the first of them.
      key: a random key; folded with the position.
      temperature: float32 scalar; 0 is greedy.
      implementation: the operator's.

    Returns:
      The chosen tokens, and the cache.
    """
    logits, cache = forward(model, tokens, cache, positions, implementation=implementation)
    last = logits[:, -1]
    greedy = jnp.argmax(last, axis=-1).astype(jnp.int32)
    key = jax.random.fold_in(key, positions[0])
    warmth = jnp.where(temperature > 0, temperature, 1.0)
    below = last - last.max(axis=-1, keepdims=True)  # so that no quotient is infinite
    sampled = jax.random.categorical(key, below / warmth).astype(jnp.int32)
    return Step(jnp.where(temperature > 0, sampled, greedy), greedy), cache


def generate(
    model: Model,
    cache: KVCache | FloatCache,
    prompt: np.ndarray,
    *,
    temperature: float,
    seed: int,
    implementation: Implementation = None,
) -> Iterator[Step]:
    """Continues one text, a token at a time, until the cache is full.

    Args:
      model: see `jax_kvcache.checkpoints.load`.
      cache: an empty cache of one text; donated.
      prompt: [N] int32, at least one token and at most the cache's rows.
      temperature: of the sampling; 0 is greedy.
      seed: of the sampling.
      implementation: the operator's.

    Yields:
      The next token, on the host.
    """
    key, warmth = jax.random.key(seed), jnp.float32(temperature)
    choose = functools.partial(read, implementation=implementation)
    tokens, position, rows = jnp.asarray(prompt, jnp.int32)[None, :], 0, cache_rows(cache)
    while position + tokens.shape[1] <= rows:
        positions = jnp.full((1,), position, jnp.int32)
        step, cache = choose(model, cache, tokens, positions, key, warmth)
        yield jax.device_get(step)
        position += tokens.shape[1]
        tokens = step.token[:, None]


def greedy_with_float_cache(model: Model, text: np.ndarray, rows: int) -> np.ndarray:
    """The greedy choice after every token of a text, made with a float cache.

    Args:
      model: see `jax_kvcache.checkpoints.load`.
      text: [N] int32.
      rows: at least N; one compiled program serves all texts with the same number.

    Returns:
      [N] int32.
    """
    tokens = np.zeros((1, rows), np.int32)  # causal: what follows is not seen
    tokens[0, : len(text)] = text
    logits = jax.jit(forward_float)(model, jnp.asarray(tokens)).logits
    return np.asarray(jnp.argmax(logits[0, : len(text)], axis=-1), np.int32)
