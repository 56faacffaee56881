"""AscendV1, the vendor's format: `quant_model_description.json` says what every tensor is."""

import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_kvcache.checkpoints.errors import CheckpointError
from jax_kvcache.checkpoints.json_files import read_json
from jax_kvcache.checkpoints.linears import (
    Format,
    KvParameters,
    finite,
    float32,
    float_weight,
    on_host,
    optional_bias,
)
from jax_kvcache.checkpoints.tensors import FLOATS, TensorFiles
from jax_kvcache.model.linear import DynamicInt8Linear, FloatLinear, Linear, StaticInt8Linear

DESCRIPTION = "quant_model_description.json"
STEM = "quant_model_weights"
_STATIC = ("input_scale", "input_offset", "quant_bias", "deq_scale")
_PER_CHANNEL = ("weight_scale", "weight_offset")
# The tensors of a linear layer of each type, beside `weight` and an optional `bias`.
_LINEARS: dict[str, tuple[str, ...]] = {
    "FLOAT": (),
    "W8A8": _STATIC,
    "W8A8_DYNAMIC": _PER_CHANNEL,
    "W8A8_MIX": _STATIC + _PER_CHANNEL,
    "W8A16": _PER_CHANNEL,
}
_TYPES = (*_LINEARS, "C8")
# What the description says of the whole model, and the values that this reader knows.
_FACTS: dict[str, tuple[Any, ...]] = {
    "model_quant_type": _TYPES,
    "version": ("1.0.0",),
    "kv_cache_type": ("C8",),
    "kv_quant_type": ("C8",),
}
_NOTES = {"group_size": int, "metadata": dict, "optional": dict}
# A cache's parameters: the writer's names, and vllm-ascend's for the same tensors.
_CACHE_NAMES = {
    "scale_k": ("k_proj.kv_cache_scale", "attn.k_cache_scale"),
    "offset_k": ("k_proj.kv_cache_offset", "attn.k_cache_offset"),
    "scale_v": ("v_proj.kv_cache_scale", "attn.v_cache_scale"),
    "offset_v": ("v_proj.kv_cache_offset", "attn.v_cache_offset"),
}


class AscendV1Format(Format):
    """Reads linear layers by the types that the description gives their tensors."""

    def __init__(self, folder: Path, files: TensorFiles):
        """Reads the description and compares it with the files' tensors.

        Raises:
          CheckpointError: an entry is unknown, an entry has no tensor, or a tensor has no entry.
        """
        super().__init__(files)
        path = folder / DESCRIPTION
        entries = read_json(path)
        self.has_cache = "kv_cache_type" in entries or "kv_quant_type" in entries
        self.types = {n: t for n, t in entries.items() if n not in (*_FACTS, *_NOTES)}
        self.mixed: list[str] = []
        for key, known in _FACTS.items():
            if key in entries and entries[key] not in known:
                expected = " or ".join(map(repr, known))
                raise CheckpointError(
                    f"\"{key}\" of '{path}' must be {expected}, got {entries[key]!r}."
                )
        for key, kind in _NOTES.items():
            if key in entries and not isinstance(entries[key], kind):
                raise CheckpointError(
                    f"\"{key}\" of '{path}' must be {kind.__name__}, got {entries[key]!r}."
                )
        for name, kind in self.types.items():
            if name not in files and kind not in _TYPES:
                raise CheckpointError(
                    f"\"{name}\" of '{path}' is neither a tensor of a known type nor known of the "
                    f"whole model, got {kind!r}."
                )
            if name not in files:
                raise CheckpointError(
                    f"`{name}` of type {kind} is in '{path.name}' and in no file of tensors."
                )
            if kind not in _TYPES:
                raise CheckpointError(
                    f"`{name}` has the type {kind!r}; known are {', '.join(_TYPES)}."
                )
        for name, tensor in files.tensors.items():
            if name not in self.types:
                raise CheckpointError(
                    f"`{name}` ({tensor.dtype}) is in '{tensor.file}' and '{path.name}' does not "
                    "say of which type it is."
                )

    def _check_type(self, name: str, *kinds: str) -> None:
        if (got := self.types.get(name)) is not None and got not in kinds:
            raise CheckpointError(f"`{name}` must have the type {' or '.join(kinds)}, got {got}.")

    def linear(self, name: str, out: int, width: int, bias: bool) -> Linear:
        """See `Format`."""
        kind = self.types.get(f"{name}.weight", "FLOAT")
        if kind not in _LINEARS:
            raise CheckpointError(
                f"`{name}.weight` must have the type {' or '.join(_LINEARS)}, got {kind}."
            )
        for suffix in _LINEARS[kind]:
            self._check_type(f"{name}.{suffix}", kind)
        self._check_type(f"{name}.bias", "FLOAT", kind)
        static_part = kind == "W8A8"
        added = optional_bias(self.files, name, out, bias and not static_part)
        if kind == "FLOAT":
            weight = float_weight(self.files, f"{name}.weight", out, width)
            return FloatLinear(weight, added)
        codes = self.files.take(f"{name}.weight", [(out, width)], ("I8",))
        if static_part:
            return self._static(name, codes)  # quant_bias holds the bias: it is not added again
        scale = self._weight_scale(name, out)
        if kind == "W8A16":
            return FloatLinear(on_host(codes.astype(np.float32) * scale[:, None]), added)
        if kind == "W8A8_MIX":
            self._static(name, codes)  # checked, and not used
            self.mixed.append(name)
        return DynamicInt8Linear(on_host(codes), on_host(scale), added)

    def _static(self, name: str, codes: np.ndarray) -> StaticInt8Linear:
        out = len(codes)
        scale = float32(self.files, f"{name}.input_scale", (1,))
        offset = float32(self.files, f"{name}.input_offset", (1,))
        return StaticInt8Linear(
            on_host(codes),
            on_host(finite(f"{name}.input_scale", scale, positive=True)[0]),
            on_host(finite(f"{name}.input_offset", offset)[0]),
            on_host(self._deq_scale(name, out)),
            on_host(self.files.take(f"{name}.quant_bias", [(out,)], ("I32",))),
        )

    def _deq_scale(self, name: str, out: int) -> np.ndarray:
        """[out] float32; float16 models have its bits in the low half of an int64."""
        key = f"{name}.deq_scale"
        values = self.files.take(key, [(out,)], ("F32", "I64"))
        if values.dtype == np.int64:
            if (wrong := (values < 0) | (values >= 2**32)).any():
                raise CheckpointError(
                    f"`{key}` must hold float32's bits in the low half of each int64 and zeros in "
                    f"the high half, got {values[wrong][0]:#x}."
                )
            values = values.astype(np.uint32).view(np.float32)
        return finite(key, values)

    def _weight_scale(self, name: str, out: int) -> np.ndarray:
        """[out] float32, after a look at the offset, which is always zero."""
        key = f"{name}.weight_offset"
        offset = float32(self.files, key, (out, 1), (out,))
        if offset.any():
            raise CheckpointError(
                f"`{key}` must be 0, got {offset[offset != 0][0]}: weights with an offset are not "
                "supported. Quantise them symmetrically."
            )
        scale = float32(self.files, f"{name}.weight_scale", (out, 1), (out,))
        return finite(f"{name}.weight_scale", scale).reshape(out)

    def embedding(self, name: str, vocab: int, width: int) -> jax.Array:
        """See `Format`."""
        self._check_type(f"{name}.weight", "FLOAT")
        return super().embedding(name, vocab, width)

    def vector(self, name: str, size: int) -> np.ndarray:
        """See `Format`."""
        self._check_type(f"{name}.weight", "FLOAT")
        return super().vector(name, size)

    def kv_parameters(self, attention: str, heads: int, head_dim: int) -> KvParameters | None:
        """See `Format`; offsets that are all zero count as none."""
        names = {
            parameter: next((n for n in given if f"{attention}.{n}" in self.files), given[0])
            for parameter, given in _CACHE_NAMES.items()
        }
        present = any(f"{attention}.{name}" in self.files for name in names.values())
        if not present and not self.has_cache:
            return None
        parameters = {}
        for parameter, name in names.items():
            key, is_scale = f"{attention}.{name}", parameter.startswith("scale")
            self._check_type(key, "C8")
            dtypes = FLOATS if is_scale else (*FLOATS, "I32")
            values = self.files.take(key, [(heads * head_dim,)], dtypes).astype(np.float32)
            parameters[parameter] = finite(key, values, positive=is_scale).reshape(heads, head_dim)
        return parameters

    def check_all_used(self) -> None:
        """See `Format`."""
        super().check_all_used()
        if self.mixed:
            warnings.warn(
                f"{len(self.mixed)} linear layers are W8A8_MIX, as `{self.mixed[0]}`: their "
                "dynamic part is used for every token, and their static part is not.",
                stacklevel=4,
            )
