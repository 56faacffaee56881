"""The demo's model, a folder like any other that comes with the package."""

import dataclasses
import importlib.resources
import os
from pathlib import Path

import jax.numpy as jnp

from jax_kvcache.checkpoints.kv_scales import read_npz_scales
from jax_kvcache.checkpoints.load import load
from jax_kvcache.model.weights import Model


def demo_folder() -> Path:
    """The folder: AscendV1, of the Qwen2 architecture, 2.8 million parameters, bytes as tokens."""
    return Path(str(importlib.resources.files("jax_kvcache"))) / "data" / "pylm"


def load_demo(scales: str | os.PathLike[str] | None = None) -> Model:
    """Loads the demo's model.

    Args:
      scales: an .npz file of scales for the cache, as `python -m jax_kvcache calibrate` writes it;
        None takes the model's own.
    """
    return with_scales(load(demo_folder(), progress=False), scales)


def with_scales(model: Model, scales: str | os.PathLike[str] | None) -> Model:
    """The model with the cache's scales of an .npz file; as it is without one.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file is not such a file.
    """
    if scales is None:
        return model
    params = {n: jnp.asarray(a) for n, a in read_npz_scales(scales, model.config).items()}
    return dataclasses.replace(model, cache_params=params)
