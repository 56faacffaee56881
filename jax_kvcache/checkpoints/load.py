"""Reading a checkpoint folder: which format it is, and every tensor of every layer."""

import dataclasses
import os
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvcache.checkpoints import ascend_v1
from jax_kvcache.checkpoints.compressed_tensors import CompressedTensorsFormat
from jax_kvcache.checkpoints.config import FolderConfig, read_config
from jax_kvcache.checkpoints.errors import CheckpointError
from jax_kvcache.checkpoints.json_files import read_json
from jax_kvcache.checkpoints.kv_scales import read_kv_scales
from jax_kvcache.checkpoints.linears import (
    FloatFormat,
    Format,
    KvParameters,
    float32,
    float_weight,
    fuse,
    permute,
    place,
    stack_kv_parameters,
)
from jax_kvcache.checkpoints.tensors import TensorFiles
from jax_kvcache.model.linear import Linear
from jax_kvcache.model.weights import Layer, Model
from jax_kvcache.rope import permute_for_rope


def load(
    folder: str | os.PathLike[str],
    quantize: Literal["w8a8"] | None = None,
    *,
    progress: bool = True,
) -> Model:
    """Reads a model from a folder as Hugging Face or the vendor's tools write it.

    Families: Llama, Mistral, Qwen2 and Qwen3. Formats: AscendV1 (FLOAT, W8A8, W8A8_DYNAMIC,
    W8A8_MIX, W8A16, and C8 for the cache), compressed-tensors "int-quantized", and float32,
    bfloat16 or float16 without quantisation; one file or shards. Every tensor and every entry of a
    description is used or named in an error; nothing is guessed. Files are memory-mapped and read
    one tensor at a time.

    Args:
      folder: config.json, the safetensors files, and what the format has beside them.
      quantize: "w8a8" turns the float weights of every linear layer but the output matrix into
        int8, a scale per channel, and quantises their inputs per token. Only for a float folder.
      progress: whether to show a progress bar.

    Returns:
      The model. `cache_params` is None where the folder has no scales for an int8 cache: then
      `new_cache` makes a float one, and calibration (`python -m jax_kvcache calibrate`) makes
      scales.

    Raises:
      CheckpointError: the folder is not as described, or holds something that is not supported.
      ValueError: an unknown `quantize`.
    """
    if quantize not in (None, "w8a8"):
        raise ValueError(f'`quantize` must be None or "w8a8", got {quantize!r}.')
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"`folder` must be a folder, got '{path}', which is none.")
    config = read_config(path)
    described = (path / ascend_v1.DESCRIPTION).is_file()
    _check_format(path, config, described, quantize)
    with TensorFiles(path, ascend_v1.STEM if described else "model", progress) as files:
        source: Format
        if described:
            source = ascend_v1.AscendV1Format(path, files)
        elif config.quantization is not None:
            source = CompressedTensorsFormat(files, config.quantization)
        else:
            source = FloatFormat(files, quantize == "w8a8")
        return _read_model(config, source, files)


def with_scales(model: Model, scales: str | os.PathLike[str] | None) -> Model:
    """The model with the cache's scales of a file or folder; as it is without one.

    Files have K's channels in the order of the model's files, which partial rotary changes.

    Raises:
      OSError: the file cannot be read.
      ValueError: see `read_kv_scales`.
    """
    if scales is None:
        return model
    config = model.config
    shape = (config.n_layers, config.n_kv_heads, config.head_dim)
    arrays = read_kv_scales(scales, shape=shape)
    rotary = config.rope.rotary_dim(config.head_dim)
    order = permute_for_rope(None, config.head_dim, rotary_dim=rotary).order
    params = {
        name: jnp.asarray(array[..., order] if name.endswith("_k") else array)
        for name, array in arrays.items()
    }
    return dataclasses.replace(model, cache_params=params)


def _check_format(path: Path, config: FolderConfig, described: bool, quantize: str | None) -> None:
    """Raises for quantisation that no reader knows, and for two at once."""
    method = None if config.quantization is None else config.quantization.get("quant_method")
    if (path / "hf_quant_config.json").is_file():
        facts = read_json(path / "hf_quant_config.json").get("quantization", {})
        kind = facts.get("kv_cache_quant_algo") if isinstance(facts, dict) else None
        raise CheckpointError(
            f"'{path / 'hf_quant_config.json'}' says that the model is of ModelOpt, with "
            f'"kv_cache_quant_algo" {kind!r}: no int8 scale can be recovered from its fp8 scales '
            "(amax / 448, at least 1). Load the float checkpoint that it was made from, and make "
            "scales with `python -m jax_kvcache calibrate`."
        )
    if config.quantization is not None and method != "compressed-tensors":
        raise CheckpointError(
            f'"quant_method" of "quantization_config" must be "compressed-tensors", got {method!r}.'
        )
    if config.quantization is not None and described:
        raise CheckpointError(
            f"'{path}' must have one format, got both '{ascend_v1.DESCRIPTION}' and "
            '"quantization_config" in config.json.'
        )
    if quantize is not None and (config.quantization is not None or described):
        kind = "AscendV1" if described else method
        raise CheckpointError(
            f"`quantize` must be None for a folder that is quantised already, got {quantize!r} "
            f"for one of {kind}."
        )


def _read_model(config: FolderConfig, source: Format, files: TensorFiles) -> Model:
    """Reads the largest tensors first, while little else is in memory."""
    sizes = config.model
    embed = place(source.embedding("model.embed_tokens", sizes.vocab, sizes.d_model))
    head = place(_read_head(config, source, files, embed))
    layers, parameters = [], []
    for index in range(sizes.n_layers):
        name = f"model.layers.{index}"
        _check_frequencies(config, files, f"{name}.self_attn.rotary_emb.inv_freq")
        layer, of_cache = _read_layer(config, source, name)
        layers.append(layer)
        parameters.append(of_cache)
    norm = source.vector("model.norm", sizes.d_model)
    cache = stack_kv_parameters(parameters)
    source.check_all_used()
    return Model(
        embed=embed,
        layers=tuple(layers),
        norm_f=place(norm),
        head=head,
        cache_params=place(cache),
        config=sizes,
    )


def _read_head(
    config: FolderConfig, source: Format, files: TensorFiles, embed: jax.Array
) -> Linear | None:
    """The output matrix; None where it is the embedding."""
    sizes, name = config.model, "lm_head"
    if not config.tied:
        return source.linear(name, sizes.vocab, sizes.d_model, False)
    if f"{name}.weight" in files:
        stored = float_weight(files, f"{name}.weight", sizes.vocab, sizes.d_model)
        if not np.array_equal(stored, embed):
            raise CheckpointError(
                f"`{name}.weight` must equal `model.embed_tokens.weight`, since config.json has "
                '"tie_word_embeddings": true, and does not. Set it to false.'
            )
    return None


def _check_frequencies(config: FolderConfig, files: TensorFiles, name: str) -> None:
    """Old Llama files hold RoPE's frequencies, which config.json says too: the two must agree."""
    if name not in files:
        return
    rope, dim = config.model.rope, config.model.rope.rotary_dim(config.model.head_dim)
    stored = float32(files, name, (dim // 2,))
    expected = rope.theta ** -(np.arange(0, dim, 2) / dim)
    if not np.allclose(stored, expected, rtol=2**-7, atol=0):  # bfloat16's last bit, twice
        raise CheckpointError(
            f'`{name}` must be the frequencies of "rope_theta" = {rope.theta}, got '
            f"{stored[:3].tolist()} and so on. Correct config.json, or drop the tensor."
        )


def _read_layer(
    config: FolderConfig, source: Format, name: str
) -> tuple[Layer, KvParameters | None]:
    sizes, attention, mlp = config.model, f"{name}.self_attn", f"{name}.mlp"
    width, head_dim = sizes.d_model, sizes.head_dim
    q_width, kv_width = sizes.n_q_heads * head_dim, sizes.n_kv_heads * head_dim
    widths = {"q": q_width, "k": kv_width, "v": kv_width}
    parts = {
        n: source.linear(f"{attention}.{n}_proj", out, width, config.qkv_bias)
        for n, out in widths.items()
    }
    norms = {n: source.vector(f"{attention}.{n}_norm", head_dim) for n in "qk" if config.head_norms}
    cache = source.kv_parameters(attention, sizes.n_kv_heads, head_dim)
    rotary = sizes.rope.rotary_dim(head_dim)
    if rotary < head_dim:
        for n in "qk":
            parts[n] = permute(parts[n], head_dim, rotary)
        norms = permute_for_rope(norms, head_dim, rotary_dim=rotary).arrays
        if cache is not None:
            of_k = {n: a for n, a in cache.items() if n.endswith("_k")}
            cache |= permute_for_rope(of_k, head_dim, rotary_dim=rotary).arrays
    layer = Layer(
        norm1=place(source.vector(f"{name}.input_layernorm", width)),
        qkv=place(fuse(attention, parts["q"], parts["k"], parts["v"])),
        q_norm=place(norms.get("q")),
        k_norm=place(norms.get("k")),
        o=place(source.linear(f"{attention}.o_proj", width, q_width, config.o_bias)),
        norm2=place(source.vector(f"{name}.post_attention_layernorm", width)),
        gate=place(source.linear(f"{mlp}.gate_proj", sizes.d_ff, width, config.mlp_bias)),
        up=place(source.linear(f"{mlp}.up_proj", sizes.d_ff, width, config.mlp_bias)),
        down=place(source.linear(f"{mlp}.down_proj", width, sizes.d_ff, config.mlp_bias)),
    )
    return layer, cache
