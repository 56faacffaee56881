"""Scales of the int8 cache without a model: read from any format, and written in any."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np

from jax_kvcache.checkpoints import kv_scale_files, kv_scale_folders
from jax_kvcache.checkpoints.kv_scale_files import CACHE_PARAMS, Scales, Shape
from jax_kvcache.ops.checks import are_scales

ScaleFormat = Literal["npz", "onnxruntime", "ascend_v1", "compressed_tensors"]
FORMATS: tuple[ScaleFormat, ...] = get_args(ScaleFormat)
FILES: dict[str, Callable[[Any, Scales], None]] = {
    "npz": kv_scale_files.write_npz,
    "onnxruntime": kv_scale_files.write_onnxruntime,
}
WITHOUT_OFFSETS = ("onnxruntime", "compressed_tensors")
PER_HEAD = ("compressed_tensors",)  # one scale per head, or per tensor


def read_kv_scales(
    path: str | os.PathLike[str],
    *,
    num_kv_heads: int | None = None,
    shape: tuple[int, int, int] | None = None,
) -> Scales:
    """Reads the scales of an int8 cache, for a model of your own.

        scales = read_kv_scales("folder")
        cache = KVCache.create(batch, rows, num_kv_heads, head_dim, layers=layers, **scales)

    Args:
      path: a checkpoint folder (AscendV1 with a C8 cache, or compressed-tensors with an int cache;
        the scales alone are read), an .npz file of `python -m jax_kvcache calibrate`, or
        onnxruntime-genai's JSON.
      num_kv_heads: Nkv, for the JSON alone, which does not say it.
      shape: [L, Nkv, D] that the scales must have, or None.

    Returns:
      `scale_k` and `scale_v`, and `offset_k` and `offset_v` if one is not zero: [L, Nkv, D]
      float32 each. The code of a value is rint(value / scale + offset).

    Raises:
      OSError: the file cannot be read.
      ValueError: it holds no such scales, or those of another shape.
    """
    shape = None if shape is None else (shape[0], shape[1], shape[2])  # a list will do
    if os.path.isdir(path):
        scales = kv_scale_folders.read_folder(Path(path))
        _check_shape(scales, shape, path)
        return scales
    with open(path, "rb") as file:
        first = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]  # a byte order mark, or blanks
    if first == b"{":
        return kv_scale_files.read_onnxruntime(path, shape, num_kv_heads)
    return kv_scale_files.read_npz(path, shape)


def _check_shape(scales: Scales, shape: Shape | None, path: Any) -> None:
    got = scales["scale_k"].shape
    if shape is not None and got != shape:
        raise ValueError(
            f"the scales of '{path}' must have shape [L, Nkv, D] = {list(shape)}, got {list(got)}."
        )


def write_kv_scales(
    path: str | os.PathLike[str] | BinaryIO,
    scales: Mapping[str, Any],
    format: ScaleFormat,
    *,
    reduce: Literal["max"] | None = None,
) -> None:
    """Writes the scales of an int8 cache in a format that a server reads.

    Reading them back gives the same codes.

    Args:
      path: a file, open or not, for "npz" and "onnxruntime"; else a new folder, which this
        function makes, or an empty one. It gets the scales alone, named as in a model's folder:
        move its tensors and the entries of its description there, or write the whole model with
        `save`.
      scales: `scale_k` and `scale_v`, and `offset_k` and `offset_v` if there are offsets, as
        `KVCache.create` takes them: [L, Nkv, D].
      format: "npz" and "ascend_v1" hold everything. "onnxruntime" (onnxruntime-genai's JSON) holds
        no offsets. "compressed_tensors" holds no offsets and one scale per head or per tensor.
      reduce: "max" gives all channels of a head the largest of their scales, where the format
        holds no more: nothing is clipped, and small channels get fewer codes.

    Raises:
      ValueError: an unknown format, scales that are not as above, or scales that the format cannot
        hold.
      OSError: the path cannot be written.
    """
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}, got {format!r}.")
    if reduce not in (None, "max"):
        raise ValueError(f'`reduce` must be None or "max", got {reduce!r}.')
    arrays = as_format_holds(_checked(scales), format, reduce)
    if format in FILES:
        if not isinstance(path, str | os.PathLike):
            FILES[format](path, arrays)
            return
        with open(path, "wb") as file:
            FILES[format](file, arrays)
        return
    kv_scale_folders.WRITERS[format](check_new_folder(path), arrays)


def check_new_folder(path: Any) -> Path:
    """The path; raises ValueError unless it is a folder to be made, or an empty one."""
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`path` must be a new or an empty folder, and '{folder}' holds files.")
    return folder


def _checked(scales: Mapping[str, Any]) -> Scales:
    """The scales as float32 arrays of one shape."""
    unknown = set(scales) - set(CACHE_PARAMS)
    missing = [name for name in ("scale_k", "scale_v") if scales.get(name) is None]
    if unknown or missing:
        raise ValueError(
            f"`scales` must have scale_k and scale_v, and may have offset_k and offset_v, got "
            f"{', '.join(sorted(scales)) or 'nothing'}."
        )
    arrays = {n: np.asarray(a, np.float32) for n, a in scales.items() if a is not None}
    if ("offset_k" in arrays) != ("offset_v" in arrays):
        raise ValueError("`scales` must have offset_k and offset_v together, or neither.")
    shape = arrays["scale_k"].shape
    for name, array in arrays.items():
        if array.ndim != 3 or array.shape != shape:
            raise ValueError(
                f"`{name}` must have shape [L, Nkv, D]"
                f"{f' = {list(shape)}' if len(shape) == 3 else ''}, got {list(array.shape)}."
            )
        if not array.size:
            raise ValueError(f"`{name}` must have numbers, got shape {list(shape)}.")
        usable = are_scales(array) if name.startswith("scale") else np.isfinite(array)
        if not usable.all():
            raise ValueError(f"`{name}` must be finite, and scales normal and above 0.")
    return arrays


def as_format_holds(arrays: Scales, format: str, reduce: str | None) -> Scales:
    """The scales as a format can hold them.

    Raises:
      ValueError: it cannot.
    """
    offsets = [n for n, a in arrays.items() if n.startswith("offset") and a.any()]
    if offsets and format in WITHOUT_OFFSETS:
        raise ValueError(
            f'`format="{format}"` holds no offsets, and `{offsets[0]}` is not 0: calibrate '
            'without offsets, or use "ascend_v1" or "npz".'
        )
    arrays = {n: a for n, a in arrays.items() if offsets or n.startswith("scale")}
    if format not in PER_HEAD:
        return arrays
    largest = {n: a.max(axis=-1, keepdims=True) for n, a in arrays.items()}
    for name, array in arrays.items():
        if reduce is None and (array != largest[name]).any():
            raise ValueError(
                f'`format="{format}"` holds one scale per head or per tensor, and `{name}` has '
                f'one per channel: `reduce="max"` takes the largest of each head.'
            )
    return {n: np.broadcast_to(a, arrays[n].shape).copy() for n, a in largest.items()}
