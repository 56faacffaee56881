"""The demo model under observation, and with its K and V kept in other formats."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_kvcache.model import forward_float
from jax_kvcache.model.evaluate import window_nll
from jax_kvcache.numerics.calibration import Calibration, fake_quantize
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
      model: see `load_model`.
      tokens: [B, S] int32 bytes.
      targets: [B] int32, a window's length less 1: what follows is padding and becomes NaN, which
        observers leave out. None for windows that are full.

    Returns:
      "k" and "v": [B, S, L, Nkv, D] float32.
    """
    _, *kv = forward_float(model, tokens, table_dtype=jnp.float32)
    if targets is not None:
        steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        read = (steps[None, :] <= targets[:, None]) & (targets[:, None] > 0)
        kv = [jnp.where(read[None, :, :, None, None], a, jnp.nan) for a in kv]
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


def int8_cache(calibrations):
    """A `kv_map` for `forward_float`: what an int8 cache with such {"k", "v"} gives back."""

    def kv_map(layer, *kv):
        result = []
        for name, values in zip("kv", kv, strict=True):
            scale, offset = calibrations[name]
            offset = None if offset is None else offset[layer]
            result.append(fake_quantize(values, scale[layer], offset).values)
        return tuple(result)

    return kv_map


def format_cache(name, calibrations):
    """A `kv_map` for `forward_float`: what a cache of a format in `FORMATS` gives back."""

    def kv_map(layer, k, v):
        return tuple(
            FORMATS[name](values, calibrations[which].scale[layer])
            for which, values in (("k", k), ("v", v))
        )

    return kv_map


def own_calibrations(model) -> dict[str, Calibration]:
    """The scales that the model carries."""
    params = model.cache_params
    return {n: Calibration(params[f"scale_{n}"], params.get(f"offset_{n}")) for n in "kv"}


class Prediction(NamedTuple):
    """What a model predicted in windows of S bytes.

    Attributes:
      nll: [B] mean negative log-likelihood of each window, nats per byte.
      divergence: [B] mean divergence from the baseline's predictions, nats per byte.
      agreement: [B] share of the bytes where the greedy choice is the baseline's.
      logits: [B, S, vocab] float32.
    """

    nll: jax.Array
    divergence: jax.Array
    agreement: jax.Array
    logits: jax.Array


@functools.partial(jax.jit, static_argnames="kv_map")
def predict(model, tokens, kv_map=None, baseline=None) -> Prediction:
    """Reads full windows [B, S] through `kv_map` and compares with the baseline's logits."""
    logits, _, _ = forward_float(model, tokens, table_dtype=jnp.float32, kv_map=kv_map)
    baseline = logits if baseline is None else baseline
    last = jnp.full(tokens.shape[:1], tokens.shape[1] - 1, jnp.int32)
    return Prediction(
        window_nll(logits, tokens, last) / last,
        jnp.mean(divergence(logits, baseline), -1),
        jnp.mean(jnp.argmax(logits, -1) == jnp.argmax(baseline, -1), -1),
        logits,
    )
