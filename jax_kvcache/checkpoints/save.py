"""Writing a model as an AscendV1 folder, which `load` and the vendor's servers read."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jax_kvcache.checkpoints import ascend_v1
from jax_kvcache.checkpoints.kv_scale_folders import kv_tensors
from jax_kvcache.checkpoints.kv_scales import check_new_folder
from jax_kvcache.model.linear import DynamicInt8Linear, FloatLinear, Linear, StaticInt8Linear
from jax_kvcache.model.weights import Layer, Model
from jax_kvcache.rope import permute_for_rope

_OF_COLUMNS = ("weight", "weight_scale", "bias")  # a linear layer's fields that have its columns


class _Tensors:
    """The tensors of a folder, and the description's entry of each."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.types: dict[str, str] = {}

    def put(self, name: str, value: Any, kind: str) -> None:
        self.arrays[name] = np.ascontiguousarray(value)
        self.types[name] = kind

    def linear(self, name: str, linear: Linear) -> None:
        """One linear layer, as its type has it."""
        if isinstance(linear, FloatLinear):
            self.put(f"{name}.weight", linear.weight, "FLOAT")
        elif isinstance(linear, DynamicInt8Linear):
            kind, scale = "W8A8_DYNAMIC", np.asarray(linear.weight_scale)[:, None]
            self.put(f"{name}.weight", linear.weight, kind)
            self.put(f"{name}.weight_scale", scale, kind)
            self.put(f"{name}.weight_offset", np.zeros_like(scale), kind)
        else:
            self._static(name, linear)
            return
        if linear.bias is not None:
            self.put(f"{name}.bias", linear.bias, "FLOAT")

    def _static(self, name: str, linear: StaticInt8Linear) -> None:
        none = np.zeros(linear.weight.shape[0], np.int32)
        bias = none if linear.bias is None else np.asarray(linear.bias)
        if bias.dtype != np.int32:
            raise ValueError(
                f"`{name}` has static activations and a float bias, and AscendV1 has an integer "
                "one there: it cannot be written without changing results."
            )
        self.put(f"{name}.weight", linear.weight, "W8A8")
        self.put(f"{name}.input_scale", np.reshape(linear.input_scale, (1,)), "W8A8")
        self.put(f"{name}.input_offset", np.reshape(linear.input_offset, (1,)), "W8A8")
        self.put(f"{name}.deq_scale", linear.weight_scale, "W8A8")
        self.put(f"{name}.quant_bias", bias, "W8A8")


def save(model: Model, folder: str | os.PathLike[str]) -> None:
    """Writes a model as AscendV1: W8A8_DYNAMIC, W8A8 and FLOAT layers as they are, and a C8 cache.

    `load` reads it back to the same logits. A `Model` has no tokenizer: copy the files of yours.

    Args:
      model: see `load`; with `quantize="w8a8"` its linear layers are W8A8_DYNAMIC.
      folder: a new folder, which this function makes, or an empty one.

    Raises:
      ValueError: the folder holds files, or a layer is of a kind that AscendV1 cannot hold.
      OSError: the folder cannot be written.
    """
    path = check_new_folder(folder)
    tensors = _Tensors()
    tensors.put("model.embed_tokens.weight", model.embed, "FLOAT")
    tensors.put("model.norm.weight", model.norm_f, "FLOAT")
    if model.head is not None:
        tensors.linear("lm_head", model.head)
    for index, layer in enumerate(model.layers):
        _put_layer(tensors, f"model.layers.{index}", layer, model)
    if model.cache_params is not None:
        for name, array in kv_tensors(cache_params_of_files(model, model.cache_params)).items():
            tensors.put(name, array, "C8")
    kinds = [kind for kind in tensors.types.values() if kind not in ("FLOAT", "C8")]
    description: dict[str, Any] = dict(tensors.types)
    description |= {"model_quant_type": kinds[0] if kinds else "FLOAT", "version": "1.0.0"}
    description |= {"group_size": 0, "metadata": {}, "optional": {}}
    if model.cache_params is not None:
        description |= {"kv_cache_type": "C8", "kv_quant_type": "C8"}
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors.arrays, path / f"{ascend_v1.STEM}.safetensors", metadata={"format": "pt"})
    (path / ascend_v1.DESCRIPTION).write_text(json.dumps(description, indent=1, sort_keys=True))
    config = _config(model, has_deq_scale="W8A8" in kinds)
    (path / "config.json").write_text(json.dumps(config, indent=1))


def cache_params_of_files(model: Model, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The cache's parameters with K's channels in the order of the model's files.

    Args:
      model: partial rotary gave each head's columns another order when it was loaded.
      params: [L, Nkv, D] each, in the order of `Model.cache_params`.
    """
    back = _order_back(model)
    arrays = {n: np.asarray(a) for n, a in params.items() if a is not None}
    return {n: a[..., back] if n.endswith("_k") else a for n, a in arrays.items()}


def _order_back(model: Model) -> np.ndarray:
    """The order that undoes what partial rotary did to each head's columns on loading."""
    config = model.config
    rotary = config.rope.rotary_dim(config.head_dim)
    return np.argsort(permute_for_rope(None, config.head_dim, rotary_dim=rotary).order)


def _put_layer(tensors: _Tensors, name: str, layer: Layer, model: Model) -> None:
    attention, mlp, back = f"{name}.self_attn", f"{name}.mlp", _order_back(model)
    for n, linear in zip("qkv", _apart(layer, model), strict=True):
        if n != "v":
            heads = np.arange(0, linear.weight.shape[0], len(back))[:, None]
            linear = _columns(linear, (heads + back).reshape(-1))
        tensors.linear(f"{attention}.{n}_proj", linear)
    for n, norm in (("q", layer.q_norm), ("k", layer.k_norm)):
        if norm is not None:
            tensors.put(f"{attention}.{n}_norm.weight", np.asarray(norm)[back], "FLOAT")
    tensors.linear(f"{attention}.o_proj", layer.o)
    for n, linear in (("gate", layer.gate), ("up", layer.up), ("down", layer.down)):
        tensors.linear(f"{mlp}.{n}_proj", linear)
    tensors.put(f"{name}.input_layernorm.weight", layer.norm1, "FLOAT")
    tensors.put(f"{name}.post_attention_layernorm.weight", layer.norm2, "FLOAT")


def _apart(layer: Layer, model: Model) -> list[Linear]:
    """q, k and v as one linear layer each."""
    if len(layer.qkv) == 3:
        return list(layer.qkv)
    config = model.config
    heads = [config.n_q_heads, config.n_kv_heads, config.n_kv_heads]
    ends = np.cumsum(heads) * config.head_dim
    starts = [0, *ends[:-1]]
    return [_columns(layer.qkv[0], np.arange(i, j)) for i, j in zip(starts, ends, strict=True)]


def _columns(linear: Linear, columns: np.ndarray) -> Linear:
    """A linear layer with some of its output columns, as NumPy arrays."""
    fields = {n: a for n, a in vars(linear).items() if n in _OF_COLUMNS and a is not None}
    chosen: dict[str, Any] = {n: np.asarray(a)[columns] for n, a in fields.items()}
    return dataclasses.replace(linear, **chosen)


def _biases(linears: Iterable[Linear]) -> set[bool]:
    """Whether layers have a bias of their own; those of static activations have another."""
    own = (linear for linear in linears if not isinstance(linear, StaticInt8Linear))
    return {linear.bias is not None for linear in own}


def _config(model: Model, has_deq_scale: bool) -> dict[str, Any]:
    """config.json: the family that has the model's parts."""
    config, layers = model.config, model.layers
    windows = set(config.windows)
    qkv_biases = _biases(linear for layer in layers for linear in layer.qkv)
    o_biases = _biases(layer.o for layer in layers)
    mlp_biases = _biases(linear for x in layers for linear in (x.gate, x.up, x.down))
    if layers[0].q_norm is not None:
        family = "Qwen3"
    elif qkv_biases == {True} and True not in o_biases:
        family = "Qwen2"
    else:
        family = "Mistral" if windows != {None} else "Llama"
    rope = dict(config.rope.values) | {
        "rope_type": config.rope.type,
        "rope_theta": config.rope.theta,
        "partial_rotary_factor": config.rope.partial_rotary_factor,
    }
    values = {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "hidden_act": "silu",
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_q_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "attention_bias": family != "Qwen2" and qkv_biases | o_biases == {True},
        "mlp_bias": mlp_biases == {True},
        "tie_word_embeddings": model.head is None,
        "eos_token_id": list(config.end_tokens),
        # Servers read deq_scale as float32 for a bfloat16 model alone.
        "dtype": "bfloat16" if has_deq_scale else "float32",
    }
    if windows != {None}:
        values["sliding_window"] = max(window for window in windows if window is not None)
        values["layer_types"] = [
            "full_attention" if window is None else "sliding_attention" for window in config.windows
        ]
        values["use_sliding_window"] = True
    return values
