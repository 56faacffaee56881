"""Scales of the int8 cache in a folder: AscendV1's C8 tensors, and compressed-tensors'."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jax_kvcache.checkpoints import ascend_v1
from jax_kvcache.checkpoints.compressed_tensors import CacheScales, cache_scheme
from jax_kvcache.checkpoints.errors import CheckpointError
from jax_kvcache.checkpoints.json_files import (
    MOST_HEAD_DIM,
    MOST_HEADS,
    MOST_LAYERS,
    Values,
    read_json,
)
from jax_kvcache.checkpoints.kv_scale_files import Scales
from jax_kvcache.checkpoints.linears import stack_kv_parameters
from jax_kvcache.checkpoints.tensors import OF_A_CACHE, TensorFiles


def read_folder(folder: Path) -> Scales:
    """Reads the cache's scales alone; the folder may hold a whole model beside them.

    Raises:
      CheckpointError: the folder has none, or cannot be read.
    """
    path = folder / "config.json"
    config = Values(read_json(path), f"'{path}'")
    layers = config.count("num_hidden_layers", most=MOST_LAYERS)
    kv_heads, head_dim = _heads(config)
    described = (folder / ascend_v1.DESCRIPTION).is_file()
    quantization = config.get("quantization_config", dict)
    if not described and quantization is None:
        raise CheckpointError(
            f"'{folder}' must have scales for a cache, and is neither AscendV1 nor "
            "compressed-tensors. Make them with `python -m jax_kvcache calibrate`."
        )
    with TensorFiles(folder, ascend_v1.STEM if described else "model", False) as files:
        if described:
            read = ascend_v1.AscendV1Format(folder, files).kv_parameters
        else:
            read = CacheScales(files, quantization or {}).read
        names = (f"model.layers.{i}.self_attn" for i in range(layers))
        scales = stack_kv_parameters([read(name, kv_heads, head_dim) for name in names])
        if extra := sorted(name for name in files.unused if name.endswith(OF_A_CACHE)):
            raise CheckpointError(
                f"'{path}' says that there are {layers} layers, and no place is left for "
                f"`{extra[0]}`."
            )
    if scales is None:
        raise CheckpointError(
            f"'{folder}' must have scales for a cache, and its description has none. Make them "
            "with `python -m jax_kvcache calibrate`."
        )
    return scales


def _heads(config: Values) -> tuple[int, int]:
    """Nkv and D."""
    heads = config.count("num_attention_heads", most=MOST_HEADS)
    kv_heads = config.count("num_key_value_heads", heads, most=MOST_HEADS)
    if config.get("head_dim", int) is not None:
        return kv_heads, config.count("head_dim", most=MOST_HEAD_DIM)
    width = config.count("hidden_size", most=heads * MOST_HEAD_DIM)
    if width % heads:
        raise CheckpointError(
            f'{config.where} must have "head_dim": "hidden_size" = {width} is no multiple of '
            f'"num_attention_heads" = {heads}.'
        )
    return kv_heads, width // heads


def kv_tensors(scales: Scales) -> dict[str, np.ndarray]:
    """AscendV1's C8 tensors, [Nkv * D] float32; zeros where there are no offsets."""
    tensors = {}
    for n in "kv":
        scale = scales[f"scale_{n}"]
        offset = scales.get(f"offset_{n}", np.zeros_like(scale))
        for i in range(len(scale)):
            prefix = f"model.layers.{i}.self_attn.{n}_proj.kv_cache_"
            tensors[f"{prefix}scale"] = np.ascontiguousarray(scale[i].reshape(-1))
            tensors[f"{prefix}offset"] = np.ascontiguousarray(offset[i].reshape(-1))
    return tensors


def _facts(scales: Scales) -> dict[str, Any]:
    """What config.json must say, so that the tensors can be read."""
    layers, heads, head_dim = scales["scale_k"].shape
    return {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
    }


def write_ascend_v1(folder: Path, scales: Scales) -> None:
    """C8 tensors and the description's entries for them, to be put beside a model's."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = kv_tensors(scales)
    description = {
        **dict.fromkeys(tensors, "C8"),
        "kv_cache_type": "C8",
        "kv_quant_type": "C8",
        "version": "1.0.0",
    }
    save_file(tensors, folder / f"{ascend_v1.STEM}.safetensors")
    (folder / ascend_v1.DESCRIPTION).write_text(json.dumps(description, indent=1))
    (folder / "config.json").write_text(json.dumps(_facts(scales), indent=1))


def write_compressed_tensors(folder: Path, scales: Scales) -> None:
    """k_scale and v_scale of each layer, and the `kv_cache_scheme` that describes them."""
    per_head = {n: scales[f"scale_{n}"][:, :, 0] for n in "kv"}  # [L, Nkv]
    per_tensor = all((a == a[:, :1]).all() for a in per_head.values())
    tensors = {}
    for n, values in per_head.items():
        for i, row in enumerate(values):
            scale = row[:1] if per_tensor else row.reshape(-1, 1, 1)
            tensors[f"model.layers.{i}.self_attn.{n}_scale"] = np.ascontiguousarray(scale)
    scheme = cache_scheme("tensor" if per_tensor else "attn_head")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    quantization = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}
    text = json.dumps(_facts(scales) | {"quantization_config": quantization}, indent=1)
    (folder / "config.json").write_text(text)


WRITERS: dict[str, Callable[[Path, Scales], None]] = {
    "ascend_v1": write_ascend_v1,
    "compressed_tensors": write_compressed_tensors,
}
