"""compressed-tensors, the format of llm-compressor: "int-quantized" weights and activations."""

import re
from typing import Any

import numpy as np

from jax_kvcache.checkpoints.errors import CheckpointError
from jax_kvcache.checkpoints.json_files import Values
from jax_kvcache.checkpoints.linears import (
    Format,
    KvParameters,
    finite,
    float32,
    float_weight,
    on_host,
    optional_bias,
)
from jax_kvcache.checkpoints.tensors import TensorFiles
from jax_kvcache.model.linear import DynamicInt8Linear, FloatLinear, Linear, StaticInt8Linear

_WHERE = '"quantization_config" of config.json'
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_WEIGHTS = {**_INT8, "strategy": "channel", "dynamic": False}
_DYNAMIC_INPUTS = {**_INT8, "strategy": "token", "dynamic": True}
_STATIC_INPUTS = {**_INT8, "strategy": "tensor", "dynamic": False}
# Keys that say nothing about the arithmetic of 8 bits per channel, tensor or token.
_HARMLESS = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
_KEYS = (
    "quant_method",
    "format",
    "quantization_status",
    "config_groups",
    "ignore",
    "kv_cache_scheme",
    "sparsity_config",
    "version",
    "global_compression_ratio",
)
_GROUP_KEYS = ("targets", "weights", "input_activations", "output_activations", "format")
# With more, a pattern can keep Python's matcher busy for years.
_MOST_REPEATS, _MOST_PARENTHESES = 4, 4


class CompressedTensorsFormat(Format):
    """Reads linear layers as `quantization_config` of config.json describes them."""

    def __init__(self, files: TensorFiles, quantization: dict[str, Any]):
        """Checks the description.

        Raises:
          CheckpointError: it describes something that this reader does not know.
        """
        super().__init__(files)
        config = Values(quantization, _WHERE)
        _check_keys(config, _KEYS)
        _expect(config, "format", "int-quantized")
        _expect(config, "quantization_status", "compressed", None)
        sparsity = Values(config.get("sparsity_config", dict, {}), f'"sparsity_config" of {_WHERE}')
        _expect(sparsity, "format", "dense", None)
        groups = config.get("config_groups", dict, {})
        if len(groups) != 1:
            raise CheckpointError(
                f'"config_groups" of {config.where} must have one group, got {sorted(groups)}.'
            )
        ((name, values),) = groups.items()
        group = Values(values if isinstance(values, dict) else {}, f'"{name}" of {config.where}')
        _check_keys(group, _GROUP_KEYS)
        _expect(group, "format", "int-quantized", None)
        _expect(group, "targets", ["Linear"])
        _expect(group, "output_activations", None)
        _check_scheme(group, "weights", _WEIGHTS)
        inputs = _check_scheme(group, "input_activations", _DYNAMIC_INPUTS, _STATIC_INPUTS)
        self.static = inputs is _STATIC_INPUTS
        self.ignored = [_pattern(entry, config) for entry in config.get("ignore", list, [])]
        self.cache = CacheScales(files, quantization)

    def _is_ignored(self, name: str) -> bool:
        return any(
            entry in (name, "Linear") if isinstance(entry, str) else entry.match(name)
            for entry in self.ignored
        )

    def linear(self, name: str, out: int, width: int, bias: bool) -> Linear:
        """See `Format`."""
        added = optional_bias(self.files, name, out, bias)
        if self._is_ignored(name):
            return FloatLinear(float_weight(self.files, f"{name}.weight", out, width), added)
        codes = self.files.take(f"{name}.weight", [(out, width)], ("I8",))
        scale = finite(
            f"{name}.weight_scale", float32(self.files, f"{name}.weight_scale", (out, 1))
        ).reshape(out)
        if not self.static:
            return DynamicInt8Linear(on_host(codes), on_host(scale), added)
        key = f"{name}.input_scale"
        inputs = finite(key, float32(self.files, key, (1,)), positive=True)[0]
        return StaticInt8Linear(
            weight=on_host(codes),
            input_scale=on_host(inputs),
            input_offset=on_host(np.float32(0)),
            weight_scale=on_host(scale * inputs),
            bias=added,
        )

    def kv_parameters(self, attention: str, heads: int, head_dim: int) -> KvParameters | None:
        """See `Format`."""
        return self.cache.read(attention, heads, head_dim)


class CacheScales:
    """Reads the cache's scales, as `kv_cache_scheme` describes them."""

    def __init__(self, files: TensorFiles, quantization: dict[str, Any]):
        """Checks the description.

        Raises:
          CheckpointError: the scales are of fp8, or of another kind than per head or per tensor.
        """
        self.files, self.strategy = files, None
        config = Values(quantization, _WHERE)
        scheme = config.get("kv_cache_scheme", dict)
        if scheme is None:
            return
        if scheme.get("type") == "float":
            raise CheckpointError(
                f'"kv_cache_scheme" of {_WHERE} has "type" float: an fp8 cache, and no int8 scale '
                "can be recovered from its scales. Set it to null, drop k_scale and v_scale, and "
                "make scales with `python -m jax_kvcache calibrate`."
            )
        known = (cache_scheme(strategy) for strategy in ("tensor", "attn_head"))
        self.strategy = _check_scheme(config, "kv_cache_scheme", *known)["strategy"]

    def read(self, attention: str, heads: int, head_dim: int) -> KvParameters | None:
        """The parameters of a layer, [Nkv, D]; None where the cache is float."""
        if self.strategy is None:
            return None
        shape = (1,) if self.strategy == "tensor" else (heads, 1, 1)
        parameters = {}
        for name in "kv":
            key = f"{attention}.{name}_scale"
            values = finite(key, float32(self.files, key, shape), positive=True)
            by_head = np.broadcast_to(values.reshape(-1, 1), (heads, head_dim))
            parameters[f"scale_{name}"] = by_head.copy()
        return parameters


def cache_scheme(strategy: str) -> dict[str, Any]:
    """The `kv_cache_scheme` of int8 scales per "tensor" or per "attn_head"."""
    return {**_INT8, "strategy": strategy, "dynamic": False}


def _pattern(entry: Any, config: Values) -> str | re.Pattern[str]:
    """An entry of `ignore`: a layer's name, or "re:" and a regular expression for its start."""
    if not isinstance(entry, str):
        raise CheckpointError(f'"ignore" of {config.where} must be strings, got {entry!r}.')
    if not entry.startswith("re:"):
        return entry
    text = entry[3:]
    repeats, parentheses = sum(map(text.count, "*+?{")), text.count("(")
    if repeats > _MOST_REPEATS or parentheses > _MOST_PARENTHESES or re.search(r"\)[*+?{]", text):
        raise CheckpointError(
            f'"ignore" of {config.where} must have patterns of at most {_MOST_REPEATS} repeats and '
            f"{_MOST_PARENTHESES} parentheses, none of them repeated, got {entry[:80]!r}. Name the "
            "layers."
        )
    try:
        return re.compile(text)
    except re.error as error:
        raise CheckpointError(
            f'"ignore" of {config.where} must have regular expressions after "re:", got '
            f"{entry[:80]!r}: {error}."
        ) from error


def _check_keys(values: Values, known: tuple[str, ...]) -> None:
    """Raises for what might change the arithmetic; null and {} count as absent."""
    for key, value in values.values.items():
        if key not in known and value is not None and value != {}:
            raise CheckpointError(
                f'{values.where} has the key "{key}", which this reader does not know; known are '
                f"{', '.join(known)}."
            )


def _expect(values: Values, key: str, *allowed: Any) -> None:
    got = values.values.get(key)
    if got not in allowed:
        expected = " or ".join("null" if a is None else repr(a) for a in allowed)
        raise CheckpointError(f'"{key}" of {values.where} must be {expected}, got {got!r}.')


def _check_scheme(values: Values, key: str, *known: dict[str, Any]) -> dict[str, Any]:
    """Which of the known schemes the value is; null values count as absent."""
    got = {k: v for k, v in values.get(key, dict, {}).items() if v is not None}
    compared = {k: v for k, v in got.items() if k not in _HARMLESS and v != {}}
    for scheme in known:
        if compared == scheme:
            return scheme
    expected = " or ".join(map(str, known))
    raise CheckpointError(f'"{key}" of {values.where} must be {expected}, got {got}.')
