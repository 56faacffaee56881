"""The demo's model, a folder like any other that comes with the package."""

import dataclasses
import importlib.resources
import os
from pathlib import Path

import jax.numpy as jnp

from jax_kvcache.checkpoints.kv_scales import read_kv_scales
from jax_kvcache.checkpoints.load import load
from jax_kvcache.model.weights import Model
from jax_kvcache.rope import permute_for_rope


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

    Files have K's channels in the order of the model's files, which partial rotary changes.

    Raises:
      OSError: the file cannot be read.
      ValueError: see `read_kv_scales`.
    """
    if scales is None:
        return model
    config = model.config
    shape = (config.n_layers, config.n_kv_heads, config.head_dim)
    arrays = read_kv_scales(scales, shape=shape)
    rotary = config.rope.rotary_dim(config.head_dim)
    order = permute_for_rope(None, config.head_dim, rotary_dim=rotary).order
    params = {
        name: jnp.asarray(array[..., order] if name.endswith("_k") else array)
        for name, array in arrays.items()
    }
    return dataclasses.replace(model, cache_params=params)
