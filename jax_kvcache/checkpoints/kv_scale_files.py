"""Scales of the int8 cache in one file: .npz, and onnxruntime-genai's JSON."""

import json
import os
from typing import Any, BinaryIO

import numpy as np

from jax_kvcache.ops.checks import are_scales, is_int

Scales = dict[str, np.ndarray]  # scale_k, scale_v, and perhaps offsets: [L, Nkv, D] float32
Shape = tuple[int, int, int]  # L, Nkv, D
CACHE_PARAMS = ("scale_k", "scale_v", "offset_k", "offset_v")


def read_npz(path: str | os.PathLike[str], shape: Shape | None) -> Scales:
    """Reads `layers.I.scale_k`, `scale_v` and perhaps offsets, [Nkv, D] float32 each.

    Args:
      path: the file.
      shape: what it must hold; None takes the layers and the shape that it has.

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
        names = [name for name in data.files if name.endswith(CACHE_PARAMS)]
        arrays = {name: _read_array(data, name, path) for name in names}
    if shape is None:
        first = next(iter(arrays.values()), np.zeros((1, 1)))
        count = sum(name.endswith("scale_k") for name in names)
        shape = (max(count, 1), *np.atleast_2d(first).shape[-2:])
    return _check_npz(arrays, path, shape)


def write_npz(file: BinaryIO, scales: Scales) -> None:
    """Writes the file that `read_npz` reads."""
    arrays = {f"layers.{i}.{n}": row for n, a in scales.items() for i, row in enumerate(a)}
    np.savez(file, **arrays)


def read_onnxruntime(
    path: str | os.PathLike[str], shape: Shape | None, num_kv_heads: int | None
) -> Scales:
    """Reads onnxruntime-genai's JSON: a vector of Nkv * D numbers for each layer.

    Args:
      path: the file.
      shape: what it must hold, or None.
      num_kv_heads: Nkv, which the file does not say, where there is no `shape`.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file is not such a file, or nobody says how many heads there are.
    """
    with open(path, "rb") as file:
        try:
            content = json.load(file)
            layers = content["layer_ids"]
            vectors = {n: np.array(content["scales"][f"{n}_scales"]) for n in "kv"}
            kinds = {array.dtype.kind for array in vectors.values()}
            if not isinstance(layers, list) or kinds - {"i", "f"}:
                raise TypeError("layer_ids is no list, or a scale no number")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f'\'{path}\' must be JSON with "layer_ids" and with "scales", an object of '
                f'"k_scales" and "v_scales", a list of numbers for each layer: {error!r}.'
            ) from error
    heads = num_kv_heads if shape is None else shape[1]
    if heads is None:
        raise ValueError(f"`num_kv_heads` must be given, since '{path}' does not say it.")
    if not is_int(heads) or heads < 1:
        raise ValueError(f"`num_kv_heads` must be an int above 0, got {heads!r}.")
    if layers != list(range(len(layers))):
        raise ValueError(f"\"layer_ids\" of '{path}' must be 0, 1 and so on, got {layers}.")
    scales = {}
    for n, values in vectors.items():
        width = values.shape[-1] if values.ndim == 2 else 0
        wanted = (len(layers), width - width % heads) if shape is None else (
            shape[0], shape[1] * shape[2]
        )  # fmt: skip
        if values.shape != wanted or not values.size:
            raise ValueError(
                f"\"{n}_scales\" of '{path}' must have shape [L, Nkv * D] = {list(wanted)}, got "
                f"{list(values.shape)}."
            )
        with np.errstate(over="ignore"):  # becomes infinity, which the next line refuses
            values = values.astype(np.float32)
        _check_numbers(f"{n}_scales", values, path, positive=True)
        scales[f"scale_{n}"] = values.reshape(len(layers), heads, -1)
    if scales["scale_k"].shape != scales["scale_v"].shape:
        raise ValueError(
            f'"k_scales" and "v_scales" of \'{path}\' must have one shape, got '
            f"{list(vectors['k'].shape)} and {list(vectors['v'].shape)}."
        )
    return scales


def write_onnxruntime(file: BinaryIO, scales: Scales) -> None:
    """Writes the file that `read_onnxruntime` reads; every float32 comes back to the bit."""
    vectors = {f"{n}_scales": scales[f"scale_{n}"] for n in "kv"}
    content = {
        "scales": {n: a.reshape(len(a), -1).tolist() for n, a in vectors.items()},
        "layer_ids": list(range(len(scales["scale_k"]))),
    }
    file.write(json.dumps(content).encode())


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


def _check_npz(weights: Scales, path: str | os.PathLike[str], shape: Shape) -> Scales:
    layers, *heads = shape
    known = {f"layers.{i}.{name}" for i in range(layers) for name in CACHE_PARAMS}
    if extra := sorted(weights.keys() - known):
        raise ValueError(
            f"`scales` must hold {layers} layers, numbered from 0, and '{path}' holds "
            f"'{extra[0]}' too."
        )
    params = {}
    for name in CACHE_PARAMS:
        keys = [f"layers.{i}.{name}" for i in range(layers)]
        if name.startswith("offset") and not any(key in weights for key in keys):
            continue
        for key in keys:
            if key not in weights:
                raise ValueError(f"`scales` must hold '{key}', and '{path}' does not.")
            value = weights[key]
            if value.shape != tuple(heads) or value.dtype != np.float32:
                raise ValueError(
                    f"`{key}` must be float32 of shape [Nkv, D] = {heads}, "
                    f"got {value.dtype} of shape {list(value.shape)} in '{path}'."
                )
            _check_numbers(key, value, path, positive=name.startswith("scale"))
        params[name] = np.stack([weights[key] for key in keys])
    if ("offset_k" in params) != ("offset_v" in params):
        given, missing = ("k", "v") if "offset_k" in params else ("v", "k")
        raise ValueError(
            f"`scales` must hold offset_k and offset_v together, and '{path}' has offset_{given} "
            f"without offset_{missing}."
        )
    return params


def _check_numbers(
    name: str, value: np.ndarray, path: str | os.PathLike[str], *, positive: bool
) -> None:
    usable = are_scales(value) if positive else np.isfinite(value)
    if not usable.all():
        expected = "finite, normal and above 0" if positive else "finite"
        raise ValueError(f"`{name}` must be {expected}, got {value[~usable][0]} in '{path}'.")
