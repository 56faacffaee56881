"""The demo model's weights: reading them from the package and from a file of scales."""

import dataclasses
import importlib.resources
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvcache.caches import KVCache

_WEIGHT_ONLY = ("wo", "wgate", "wup", "wdown")
_CACHE_PARAMS = ("scale_k", "scale_v", "offset_k", "offset_v")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model; `context` is the longest text it was trained on, in bytes."""

    vocab: int
    d_model: int
    n_layers: int
    n_q_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    rope_theta: float
    norm_eps: float
    context: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    """The weights, a pytree; every array of `layers` and `cache_params` has the layers first.

    Attributes:
      embed: [vocab, d_model] float32, the embedding and the output matrix.
      norm_f: [d_model] float32, gain of the last RMSNorm.
      layers: norm1, norm2 [L, d_model]; wqkv [L, d_model, H] int8 with wqkv_scale and bqkv [L, H];
        wo, wgate, wup, wdown float32.
      cache_params: scale_k and scale_v, and offset_k and offset_v if there are offsets:
        [L, Nkv, D] float32.
      config: the sizes; static.
    """

    embed: jax.Array
    norm_f: jax.Array
    layers: dict[str, jax.Array]
    cache_params: dict[str, jax.Array]
    config: Config = dataclasses.field(metadata={"static": True})


def load_model(scales: str | os.PathLike[str] | None = None) -> Model:
    """Reads the model that comes with the package.

    Args:
      scales: an .npz file with `layers.I.scale_k` and `layers.I.scale_v`, [Nkv, D] float32, for
        every layer I, and likewise `offset_k` and `offset_v` if the cache is to have offsets; None
        takes the model's own.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file is not such a file.
    """
    source = importlib.resources.files("jax_kvcache").joinpath("data/pylm.npz")
    with source.open("rb") as file, np.load(file, allow_pickle=False) as data:
        weights = dict(data)
    facts = json.loads(str(weights["config"]))
    config = Config(**{field.name: facts[field.name] for field in dataclasses.fields(Config)})

    def stack(name: str) -> np.ndarray:
        return np.stack([weights[f"layers.{i}.{name}"] for i in range(config.n_layers)])

    layers = {n: stack(n) for n in ("norm1", "norm2", "wqkv", "wqkv_scale", "bqkv")}
    for name in _WEIGHT_ONLY:
        layers[name] = stack(name).astype(np.float32) * stack(f"{name}_scale")[:, None, :]
    if scales is None:
        cache_params = {name: stack(name) for name in ("scale_k", "scale_v")}
    else:
        cache_params = _read_scales(scales, config)
    arrays: dict[str, Any] = {
        "embed": weights["embed"].astype(np.float32),
        "norm_f": weights["norm_f"],
        "layers": layers,
        "cache_params": cache_params,
    }
    return Model(**jax.tree.map(jnp.asarray, arrays), config=config)


def _read_scales(path: str | os.PathLike[str], config: Config) -> dict[str, np.ndarray]:
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


def new_cache(model: Model, batch: int) -> KVCache:
    """An empty cache for `batch` texts of up to `context` bytes, with all layers in one array."""
    config = model.config
    return KVCache.create(
        batch,
        config.context,
        config.n_kv_heads,
        config.head_dim,
        layers=config.n_layers,
        **model.cache_params,
    )
