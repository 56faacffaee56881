"""A model under observation, and with its K and V kept in other formats."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_kvcache.model import forward_float
from jax_kvcache.model.evaluate import window_nll
from jax_kvcache.numerics.calibration import Calibration
from jax_kvcache.numerics.formats import FORMATS
from jax_kvcache.numerics.measures import divergence
from jax_kvcache.numerics.observers import observe


def channels(model) -> tuple[int, int, int]:
    """[L, Nkv, D]: the channels of K, and those of V."""
    config = model.config
    return config.n_layers, config.n_kv_heads, config.head_dim


def keys_and_values(model, tokens, targets=None) -> dict[str, jax.Array]:
    """K (after RoPE) and V of windows, as the operator quantises them: never rounded to bfloat16.

    Args:
      model: see `jax_kvcache.checkpoints.load`.
      tokens: [B, S] int32.
      targets: [B] int32, a window's length less 1: what follows is padding and becomes NaN, which
        observers leave out. None for windows that are full.

    Returns:
      "k" and "v": [B, S, L, Nkv, D] float32.
    """
    read = forward_float(model, tokens, table_dtype=jnp.float32)
    kv = [read.k, read.v]
    if targets is not None:
        steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        was_read = (steps[None, :] <= targets[:, None]) & (targets[:, None] > 0)
        kv = [jnp.where(was_read[None, :, :, None, None], a, jnp.nan) for a in kv]
    return {name: jnp.moveaxis(a, 0, 2) for name, a in zip("kv", kv, strict=True)}


@jax.jit
def observe_windows(model, observers, tokens, targets):
    """The observers {"k", "v"} that have also seen a batch of windows."""
    return observe(observers, keys_and_values(model, tokens, targets))


@jax.jit
def measure_windows(model, errors, calibrations, tokens, targets):
    """The `ErrorObserver`s {"k", "v"} that have also seen a batch quantised with `calibrations`."""
    kv = keys_and_values(model, tokens, targets)
    return {name: errors[name].update(kv[name], *calibrations[name]) for name in kv}


def own_calibrations(model) -> dict[str, Calibration]:
    """The scales that the model carries.

    Raises:
      ValueError: it has none.
    """
    params = model.cache_params
    if params is None:
        raise ValueError("`model` must have `cache_params`, got None: calibrate it first.")
    return {n: Calibration(params[f"scale_{n}"], params.get(f"offset_{n}")) for n in "kv"}


class Prediction(NamedTuple):
    """What a model predicted in windows of S tokens.

    Attributes:
      nll: [B] mean negative log-likelihood of each window, nats per token.
      divergence: [B] mean divergence from the baseline's predictions, nats per token.
      agreement: [B] share of the tokens where the greedy choice is the baseline's.
      logits: [B, S, vocab] float32.
    """

    nll: jax.Array
    divergence: jax.Array
    agreement: jax.Array
    logits: jax.Array


@functools.partial(jax.jit, static_argnames="format")
def predict(model, tokens, baseline=None, calibrations=None, format=None) -> Prediction:
    """Reads windows with K and V as a cache of some format gives them back.

    Args:
      model: see `jax_kvcache.checkpoints.load`.
      tokens: [B, S] int32, full windows.
      baseline: [B, S, vocab] logits to compare with; None for these ones.
      calibrations: {"k", "v"}: `Calibration` of [L, Nkv, D].
      format: a name in `FORMATS`; None for a float cache.
    """

    def kv_map(layer, *kv):
        return tuple(
            FORMATS[format](values, jax.tree.map(lambda p: p[layer], calibrations[name]))
            for name, values in zip("kv", kv, strict=True)
        )

    logits = forward_float(
        model, tokens, table_dtype=jnp.float32, kv_map=None if format is None else kv_map
    ).logits
    baseline = logits if baseline is None else baseline
    last = jnp.full(tokens.shape[:1], tokens.shape[1] - 1, jnp.int32)
    return Prediction(
        window_nll(logits, tokens, last) / last,
        jnp.mean(divergence(logits, baseline), -1),
        jnp.mean(jnp.argmax(logits, -1) == jnp.argmax(baseline, -1), -1),
        logits,
    )
