"""Scales of the int8 cache in files of their own."""

import os
from typing import Any

import numpy as np

from jax_kvcache.model.weights import Config

_CACHE_PARAMS = ("scale_k", "scale_v", "offset_k", "offset_v")


def read_npz_scales(path: str | os.PathLike[str], config: Config) -> dict[str, np.ndarray]:
    """Reads the scales that `python -m jax_kvcache calibrate` writes.

    Args:
      path: an .npz file with `layers.I.scale_k` and `layers.I.scale_v`, [Nkv, D] float32, for
        every layer I, and likewise `offset_k` and `offset_v` if the cache is to have offsets.
      config: the sizes of the model that they are for.

    Returns:
      scale_k and scale_v, and offset_k and offset_v if the file has them: [L, Nkv, D] float32.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file is not such a file.
    """
    with open(path, "rb") as file:
        try:
            data = np.load(file, allow_pickle=False)
        except Exception as error:  # see _read_array
            raise ValueError(f"`scales` must be an .npz file, and '{path}' is not.") from error
        if not isinstance(data, np.lib.npyio.NpzFile):
            raise ValueError(f"`scales` must be an .npz file, and '{path}' holds one array.")
        names = [name for name in data.files if name.endswith(_CACHE_PARAMS)]
        arrays = {name: _read_array(data, name, path) for name in names}
    return _check_scales(arrays, path, config)


def _read_array(data: Any, name: str, path: str | os.PathLike[str]) -> np.ndarray:
    """A damaged file makes NumPy, the zip reader and its decompressors raise errors of any type."""
    try:
        value = data[name]
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot read `{name}` of '{path}': {reason}.") from error
    if not isinstance(value, np.ndarray):
        raise ValueError(f"cannot read `{name}` of '{path}': it is not in .npy format.")
    return value


def _check_scales(
    weights: dict[str, np.ndarray], path: str | os.PathLike[str], config: Config
) -> dict[str, np.ndarray]:
    heads = (config.n_kv_heads, config.head_dim)
    params = {}
    for name in _CACHE_PARAMS:
        keys = [f"layers.{i}.{name}" for i in range(config.n_layers)]
        if name.startswith("offset") and not any(key in weights for key in keys):
            continue
        for key in keys:
            if key not in weights:
                raise ValueError(f"`scales` must hold '{key}', and '{path}' does not.")
            value = weights[key]
            if value.shape != heads or value.dtype != np.float32:
                raise ValueError(
                    f"`{key}` must be float32 of shape [Nkv, D] = {list(heads)}, "
                    f"got {value.dtype} of shape {list(value.shape)} in '{path}'."
                )
            usable = np.isfinite(value) & (name.startswith("offset") | (value > 0))
            if not usable.all():
                expected = "finite" if name.startswith("offset") else "finite and above 0"
                raise ValueError(
                    f"`{key}` must be {expected}, got {value[~usable][0]} in '{path}'."
                )
        params[name] = np.stack([weights[key] for key in keys])
    if ("offset_k" in params) != ("offset_v" in params):
        given, missing = ("k", "v") if "offset_k" in params else ("v", "k")
        raise ValueError(
            f"`scales` must hold offset_k and offset_v together, and '{path}' has offset_{given} "
            f"without offset_{missing}."
        )
    return params
