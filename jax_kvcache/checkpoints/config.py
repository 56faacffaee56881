"""config.json: the model's family and sizes."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from jax_kvcache.checkpoints.errors import CheckpointError
from jax_kvcache.checkpoints.json_files import MOST_HEAD_DIM, MOST_LAYERS, Values, read_json
from jax_kvcache.model.weights import Config
from jax_kvcache.rope_parameters import DEFAULT_THETA, RopeParameters, read_rope_parameters


@dataclasses.dataclass(frozen=True)
class Family:
    """What tells one architecture from another; the rest is common to all of them.

    Attributes:
      attention_bias: "qkv" where q, k and v always have a bias; "config" where `attention_bias`
        says whether they and o have one; "none".
      mlp_bias: whether `mlp_bias` may say that the MLP has biases.
      head_norms: whether each head of q and k is normalised before RoPE.
      windows: "all" layers have a `sliding_window`; "config" where `use_sliding_window` and the
        layer's number or type decide; "none".
    """

    attention_bias: str
    mlp_bias: bool
    head_norms: bool
    windows: str


FAMILIES = {
    "LlamaForCausalLM": Family("config", True, False, "none"),
    "MistralForCausalLM": Family("none", False, False, "all"),
    "Qwen2ForCausalLM": Family("qkv", False, False, "config"),
    "Qwen3ForCausalLM": Family("config", False, True, "config"),
}


@dataclasses.dataclass(frozen=True)
class FolderConfig:
    """What config.json says.

    Attributes:
      model: the sizes.
      head_norms: as in `Family`.
      qkv_bias: whether q, k and v must have a bias; o_bias and mlp_bias likewise.
      tied: whether the output matrix is the embedding.
      quantization: `quantization_config`, or None.
    """

    model: Config
    head_norms: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tied: bool
    quantization: dict[str, Any] | None


def read_config(folder: Path) -> FolderConfig:
    """Reads config.json.

    Raises:
      CheckpointError: the architecture is not known, or a value is missing or impossible.
    """
    path = folder / "config.json"
    config = Values(read_json(path), f"'{path}'")
    family = _family(config)
    activation = config.get("hidden_act", str)
    if activation != "silu":
        raise CheckpointError(f'"hidden_act" of {config.where} must be "silu", got {activation!r}.')
    width, heads = config.count("hidden_size"), config.count("num_attention_heads")
    if config.get("head_dim", int) is None and width % heads:
        raise CheckpointError(
            f'{config.where} must have "head_dim": "hidden_size" = {width} is no multiple of '
            f'"num_attention_heads" = {heads}.'
        )
    head_dim, kv_heads = (
        config.count("head_dim", width // heads, most=MOST_HEAD_DIM),
        config.count("num_key_value_heads", heads),
    )
    if heads % kv_heads or head_dim % 2:
        raise CheckpointError(
            f'{config.where} must have "num_attention_heads" a multiple of '
            f'"num_key_value_heads" and an even "head_dim", got {heads}, {kv_heads} and {head_dim}.'
        )
    eps = config.get("rms_norm_eps", (float, int))
    if eps is None or not 0 <= eps < 1:
        raise CheckpointError(f'"rms_norm_eps" of {config.where} must be in [0, 1), got {eps}.')
    layers = config.count("num_hidden_layers", most=MOST_LAYERS)
    in_attention = family.attention_bias == "config" and config.get("attention_bias", bool, False)
    return FolderConfig(
        Config(
            vocab=config.count("vocab_size"),
            d_model=width,
            n_layers=layers,
            n_q_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=head_dim,
            d_ff=config.count("intermediate_size"),
            norm_eps=float(eps),
            context=config.count("max_position_embeddings"),
            rope=_rope(config, head_dim),
            windows=_windows(config, family, layers),
            end_tokens=_end_tokens(config),
        ),
        head_norms=family.head_norms,
        qkv_bias=family.attention_bias == "qkv" or in_attention,
        o_bias=in_attention,
        mlp_bias=family.mlp_bias and config.get("mlp_bias", bool, False),
        tied=config.get("tie_word_embeddings", bool, False),
        quantization=config.get("quantization_config", dict),
    )


def _family(config: Values) -> Family:
    names = config.get("architectures", list)
    if not names or len(names) != 1 or names[0] not in list(FAMILIES):
        raise CheckpointError(
            f'"architectures" of {config.where} must be one of {", ".join(FAMILIES)}, got {names}.'
        )
    return FAMILIES[names[0]]


def _rope(config: Values, head_dim: int) -> RopeParameters:
    """`rope_parameters`, or an older file's `rope_scaling`, with what stands beside them."""
    newer, older = config.get("rope_parameters", dict), config.get("rope_scaling", dict)
    if newer is not None and older is not None and newer != older:
        raise CheckpointError(
            f'{config.where} must have "rope_parameters" or the older "rope_scaling", got both, '
            "and they differ."
        )
    parameters = dict(newer if newer is not None else older or {})
    for key in (
        "rope_theta",
        "partial_rotary_factor",
        "original_max_position_embeddings",
        "max_position_embeddings",
    ):
        beside = config.get(key, (int, float))
        inside = parameters.get(key)
        if beside is not None and inside is not None and beside != inside:
            raise CheckpointError(
                f'"{key}" of {config.where} must agree with that of its RoPE parameters, got '
                f"{beside} and {inside}."
            )
        if beside is not None:
            parameters[key] = beside
    if "rope_theta" not in parameters and _is_older_than_theta(config):
        parameters["rope_theta"] = DEFAULT_THETA
    if "rope_theta" not in parameters:
        raise CheckpointError(f'{config.where} must have "rope_theta", and does not.')
    context = config.count("max_position_embeddings")
    try:
        rope = read_rope_parameters(parameters)
        for length in (1, context):  # some types have other frequencies for long texts
            rope.frequencies(head_dim, length)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"RoPE of {config.where}: {error}") from error
    return rope


def _is_older_than_theta(config: Values) -> bool:
    """Whether a Llama's file is of transformers 4.32 or before, in which all had one theta.

    The files of Llama 1 and 2 are. A later file without it may be of a model with another one.
    """
    version = re.match(r"4\.(\d+)\.", config.get("transformers_version", str, ""))
    is_llama = config.get("architectures", list) == ["LlamaForCausalLM"]
    return is_llama and version is not None and int(version[1]) < 33


def _windows(config: Values, family: Family, layers: int) -> tuple[int | None, ...]:
    """Which layers see the last rows only."""
    window = config.get("sliding_window", int)
    needs_window = family.windows == "all" or (
        family.windows == "config" and config.get("use_sliding_window", bool, False)
    )
    if needs_window and "sliding_window" not in config.values:
        raise CheckpointError(
            f'{config.where} must have "sliding_window", null for none, and does not.'
        )
    kinds = config.get("layer_types", list)
    if family.windows == "none":
        window = None
    if family.windows == "config":
        if not config.get("use_sliding_window", bool, False):
            window = None
        elif kinds is None:
            first = config.count("max_window_layers")
            kinds = ["full_attention"] * min(first, layers)
            kinds += ["sliding_attention"] * (layers - len(kinds))
    if window is None:
        if kinds is not None and kinds != ["full_attention"] * layers:
            raise CheckpointError(
                f'"layer_types" of {config.where} must be {layers} times full_attention where '
                f"there is no sliding window, got {kinds}."
            )
        return (None,) * layers
    config.count("sliding_window")
    if kinds is None:
        return (window,) * layers
    known = ["full_attention", "sliding_attention"]
    if len(kinds) != layers or not all(kind in known for kind in kinds):
        raise CheckpointError(
            f'"layer_types" of {config.where} must be {layers} times full_attention or '
            f"sliding_attention, got {kinds}."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _end_tokens(config: Values) -> tuple[int, ...]:
    tokens = config.get("eos_token_id", (int, list), [])
    tokens = tokens if isinstance(tokens, list) else [tokens]
    if not all(isinstance(t, int) and not isinstance(t, bool) for t in tokens):
        raise CheckpointError(f'"eos_token_id" of {config.where} must be ints, got {tokens}.')
    return tuple(tokens)
