"""The demo's model, a folder like any other that comes with the package."""

import dataclasses
import importlib.resources
import os
from pathlib import Path

import jax.numpy as jnp

from jax_kvcache.checkpoints.kv_scales import read_kv_scales
from jax_kvcache.checkpoints.load import load
from jax_kvcache.model.weights import Model


def demo_folder() -> Path:
    """The folder: AscendV1, of the Qwen2 architecture, 2.8 million parameters, bytes as tokens."""
    return Path(str(importlib.resources.files("jax_kvcache"))) / "data" / "pylm"


def load_demo(scales: str | os.PathLike[str] | None = None) -> Model:
    """Loads the demo's model.

    Args:
      scales: scales for the cache, see `read_kv_scales`; None takes the model's own.
    """
    return with_scales(load(demo_folder(), progress=False), scales)


def with_scales(model: Model, scales: str | os.PathLike[str] | None) -> Model:
    """The model with the cache's scales of a file or folder; as it is without one.

    Raises:
      OSError: the file cannot be read.
      ValueError: see `read_kv_scales`.
    """
    if scales is None:
        return model
    config = model.config
    shape = (config.n_layers, config.n_kv_heads, config.head_dim)
    arrays = read_kv_scales(scales, shape=shape)
    params = {name: jnp.asarray(array) for name, array in arrays.items()}
    return dataclasses.replace(model, cache_params=params)
