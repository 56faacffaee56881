"""The demo's model, a folder like any other that comes with the package."""

import importlib.resources
import os
from pathlib import Path

from jax_kvcache.checkpoints.load import load, with_scales
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
