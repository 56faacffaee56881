"""Folders derived from the sixteen: other dtypes, types, layouts and configurations."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support import checkpoint_folder, decoding, float_decoder
from support.checkpoint_folder import Copy

from jax_kvcache import checkpoints
from jax_kvcache.model import forward, forward_float, new_cache
from jax_kvcache.model.linear import DynamicInt8Linear, FloatLinear, StaticInt8Linear

IDS = checkpoint_folder.expected("qwen2_float")["ids"]


def load(folder, **options):
    return checkpoints.load(folder, progress=False, **options)


def assert_same(model, other):
    """The same weights to the bit; a folder without scales may equal one with scales."""
    left, right = jax.tree.leaves(model), jax.tree.leaves(other)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def original(name):
    return load(checkpoint_folder.FOLDERS / name)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("name", ["qwen2_float", "qwen3_float"])
def test_16_bit_tensors(name, dtype, tmp_path):
    copy = Copy(name)
    for key, value in copy.tensors.items():
        copy.put(key, value.astype(dtype))
    model = load(copy.write(tmp_path / "folder"))
    assert model.embed.dtype == (jnp.bfloat16 if dtype == ml_dtypes.bfloat16 else jnp.float32)
    assert model.norm_f.dtype == jnp.float32
    expected = float_decoder.logits(copy.config, copy.tensors, IDS)
    for read in (decoding.at_once, decoding.token_by_token):
        assert decoding.largest_error(read(model, IDS)[0], expected) < 1e-5


def test_an_older_config(tmp_path):
    """`rope_scaling` with `type`, `rope_theta` beside it, `torch_dtype`, no `head_dim`."""
    copy = Copy("qwen2_ascendv1_static")
    rope = copy.config.pop("rope_parameters")
    copy.config["rope_theta"] = rope.pop("rope_theta")
    copy.config["rope_scaling"] = {"type": rope.pop("rope_type")} | rope
    del copy.config["dtype"], copy.config["layer_types"]
    old, new = load(copy.write(tmp_path / "folder")), original("qwen2_ascendv1_static")
    assert_same(old, new)
    assert old.config.rope.frequencies(16)[1] == new.config.rope.frequencies(16)[1]
    np.testing.assert_array_equal(
        old.config.rope.frequencies(16)[0], new.config.rope.frequencies(16)[0]
    )


def test_an_older_config_without_scaling(tmp_path):
    copy = Copy("mistral_float")
    copy.config["rope_theta"] = copy.config.pop("rope_parameters")["rope_theta"]
    copy.config["rope_scaling"] = None
    assert load(copy.write(tmp_path / "folder")).config.rope.theta == 1e4


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}])
def test_a_llama_from_before_rope_theta(scaling, tmp_path):
    """The files of Llama 1 and 2, of transformers that knew one base."""
    copy = Copy("llama3_float")
    del copy.config["rope_parameters"]
    copy.config |= {"transformers_version": "4.31.0.dev0", "rope_scaling": scaling}
    assert load(copy.write(tmp_path / "folder")).config.rope.theta == 1e4
    copy.config["transformers_version"] = "4.33.0"
    with pytest.raises(checkpoints.CheckpointError, match='must have "rope_theta"'):
        load(copy.write(tmp_path / "later"))


def to_weight_only(copy):
    for key, kind in copy.description.items():
        if kind == "W8A8_DYNAMIC" and key.startswith("model."):
            copy.description[key] = "W8A16"


def dequantised(tensors):
    """The float weights of W8A16 linear layers."""
    floats = {}
    for key, value in tensors.items():
        if value.dtype == np.int8:
            scale = tensors[f"{key}_scale"].astype(np.float64)
            floats[key] = value * scale
        elif not key.endswith(("_scale", "_offset")):
            floats[key] = value
    return floats


@pytest.mark.parametrize("name", ["mistral_ascendv1_dynamic", "qwen3_ascendv1_dynamic"])
def test_w8a16(name, tmp_path):
    copy = Copy(name)
    to_weight_only(copy)
    model = load(copy.write(tmp_path / "folder"))
    model = dataclasses.replace(model, cache_params=None)  # a float cache, as the decoder has
    logits, _ = decoding.at_once(model, IDS)
    expected = float_decoder.logits(copy.config, dequantised(copy.tensors), IDS)
    assert decoding.largest_error(logits, expected) < 1e-5


def add_static_part(copy, name):
    """Turns a W8A8_DYNAMIC layer into a W8A8_MIX one, with nonsense in its static part."""
    out = len(copy.tensors[f"{name}.weight"])
    copy.put(f"{name}.input_scale", np.array([0.5], np.float32))
    copy.put(f"{name}.input_offset", np.array([3], np.float32))
    copy.put(f"{name}.quant_bias", np.arange(out, dtype=np.int32))
    copy.put(f"{name}.deq_scale", np.full(out, 7, np.float32))
    for key in [key for key in copy.tensors if key.startswith(f"{name}.")]:
        if not key.endswith((".bias", "kv_cache_scale", "kv_cache_offset")):
            copy.description[key] = "W8A8_MIX"


def test_w8a8_mix_is_its_dynamic_part(tmp_path):
    name = "qwen2_ascendv1_dynamic"
    copy = Copy(name)
    layers = [
        f"model.layers.{i}.{n}"
        for i in range(2)
        for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
    ]
    for layer in layers:
        add_static_part(copy, layer)
    with pytest.warns(UserWarning, match=r"8 linear layers are W8A8_MIX, as `model.layers.0.self"):
        model = load(copy.write(tmp_path / "folder"))
    assert_same(model, original(name))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["llama3_float", "qwen2_ascendv1_static", "qwen3_float"])
def test_shards(name, shards, tmp_path):
    assert_same(load(Copy(name).write(tmp_path / "folder", shards)), original(name))


def test_a_folder_of_links(tmp_path):
    """As the Hub's cache keeps them: every file is a link to another folder."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (checkpoint_folder.FOLDERS / "llama3_float").iterdir():
        (folder / path.name).symlink_to(path)
    assert_same(load(folder), original("llama3_float"))


def test_other_shapes_and_dtypes_of_the_same_numbers(tmp_path):
    name = "llama3_ascendv1_dynamic"
    copy = Copy(name)
    for key, value in list(copy.tensors.items()):
        if key.endswith(("weight_scale", "weight_offset")):
            copy.put(key, value[:, 0], copy.description[key])
        if key.endswith("kv_cache_offset"):
            copy.put(key, np.rint(value).astype(np.int32), "C8")
    model = load(copy.write(tmp_path / "folder"))
    rounded = {n: np.rint(a) if "offset" in n else a for n, a in
               original(name).cache_params.items()}  # fmt: skip
    assert_same(model, dataclasses.replace(original(name), cache_params=rounded))


def test_the_servers_names_of_the_caches_scales(tmp_path):
    name = "llama3_ascendv1_dynamic"
    copy = Copy(name)
    for key in [key for key in copy.tensors if "kv_cache" in key]:
        value, attention, n = copy.tensors[key], key.split(".k_proj.")[0].split(".v_proj.")[0], key
        letter = "k" if ".k_proj." in n else "v"
        copy.drop(key)
        copy.put(f"{attention}.attn.{letter}_cache_{key.rsplit('_')[-1]}", value, "C8")
    assert_same(load(copy.write(tmp_path / "folder")), original(name))


def test_a_float_bias_beside_quant_bias_is_not_added_again(tmp_path):
    name = "llama3_ascendv1_static"
    copy = Copy(name)
    copy.put("model.layers.0.mlp.up_proj.bias", np.ones(96, np.float32), "FLOAT")
    assert_same(load(copy.write(tmp_path / "folder")), original(name))


def test_the_first_layer_float_and_its_q_by_itself(tmp_path):
    """Layers of different types, and q, k and v of different types: those go float."""
    copy = Copy("mistral_ascendv1_dynamic")
    for key in [k for k in copy.tensors if k.endswith("0.self_attn.q_proj.weight")]:
        scale = copy.tensors[f"{key}_scale"]
        copy.put(key, copy.tensors[key] * scale, "FLOAT")
        copy.drop(f"{key}_scale")
        copy.drop(f"{key}_offset")
    model = load(copy.write(tmp_path / "folder"))
    kinds = [type(linear) for linear in model.layers[0].qkv]
    assert kinds == [FloatLinear, DynamicInt8Linear, DynamicInt8Linear]
    assert len(model.layers[1].qkv) == 1
    expected = checkpoint_folder.expected("mistral_ascendv1_dynamic")
    # The activations of q were rounded to 8 bits there, and are not here.
    logits, _ = decoding.at_once(model, expected["ids"])
    assert decoding.largest_error(logits, expected["logits"]) < 0.2


def test_tied_with_the_output_matrix_in_the_file(tmp_path):
    copy = Copy("qwen2_float")
    copy.put("lm_head.weight", copy.tensors["model.embed_tokens.weight"])
    assert_same(load(copy.write(tmp_path / "folder")), original("qwen2_float"))


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_partial_rotary(share, tmp_path):
    """Columns are permuted on loading, norms of the heads with them."""
    copy = Copy("qwen3_float")
    copy.config["rope_parameters"]["partial_rotary_factor"] = share
    model = load(copy.write(tmp_path / "folder"))
    expected = float_decoder.logits(copy.config, copy.tensors, IDS)
    for read in (decoding.at_once, decoding.token_by_token):
        assert decoding.largest_error(read(model, IDS)[0], expected) < 1e-5


def test_partial_rotary_with_scales(tmp_path):
    """K's scales are permuted with its columns: the codes are those of permuted channels."""
    copies = [Copy("llama3_ascendv1_static") for _ in range(2)]
    for copy in copies:
        copy.config["partial_rotary_factor"] = 0.5
        for key in [key for key in copy.tensors if "kv_cache_scale" in key]:
            copy.put(key, copy.tensors[key].astype(np.float32), "C8")
    model = load(copies[0].write(tmp_path / "folder"))
    order = np.r_[0:8, 16:24, 8:16, 24:32]
    key = "model.layers.1.self_attn.k_proj.kv_cache_scale"
    scale = copies[0].tensors[key].reshape(2, 32)[:, order]
    np.testing.assert_array_equal(model.cache_params["scale_k"][1], scale)
    assert isinstance(model.layers[0].qkv[0], StaticInt8Linear)
    decoding.at_once(model, IDS)


KV_SCHEME = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False,
             "symmetric": True}  # fmt: skip


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_compressed_tensors_with_cache_scales(strategy, tmp_path):
    name = "llama3_compressed_tensors"
    copy = Copy(name)
    copy.config["quantization_config"]["kv_cache_scheme"] = KV_SCHEME | {"strategy": strategy}
    for i in range(2):
        for n, value in (("k", 0.05), ("v", 0.03)):
            shape = (1,) if strategy == "tensor" else (2, 1, 1)
            scale = np.full(shape, value) * (1 + np.arange(np.prod(shape)).reshape(shape))
            key = f"model.layers.{i}.self_attn.{n}_scale"
            copy.put(key, scale.astype(ml_dtypes.bfloat16))
    model = load(copy.write(tmp_path / "folder"))
    assert model.cache_params["scale_k"].shape == (2, 2, 32)
    by_head = np.asarray(model.cache_params["scale_v"][0, :, 5])
    heads = [0.03, 0.03] if strategy == "tensor" else [0.03, 0.06]
    np.testing.assert_allclose(by_head, heads, rtol=5e-3)
    expected = checkpoint_folder.expected(name)
    logits, _ = decoding.at_once(model, expected["ids"])
    assert decoding.largest_error(logits, expected["logits"]) < 0.2


def test_compressed_tensors_with_static_inputs(tmp_path):
    """Codes and scales as those of W8A8 without an offset."""
    copy = Copy("mistral_compressed_tensors")
    group = copy.config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] |= {"dynamic": False, "strategy": "tensor"}
    for key in [key for key in copy.tensors if key.endswith("_scale")]:
        copy.put(key.replace("weight_scale", "input_scale"), np.array([0.0625], np.float32))
    model = load(copy.write(tmp_path / "folder"))
    (linear,) = model.layers[0].qkv
    assert isinstance(linear, StaticInt8Linear)
    h = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    codes = np.clip(np.rint(h / 0.0625), -128, 127).astype(np.int64)
    scale = np.asarray(linear.weight_scale, np.float64)
    right = (codes @ np.asarray(linear.weight, np.int64).T) * scale
    np.testing.assert_allclose(linear(jnp.asarray(h)), right, rtol=1e-6)


def test_compressed_tensors_ignores_by_pattern(tmp_path):
    copy = Copy("qwen3_compressed_tensors")
    name = "model.layers.0.mlp.down_proj"
    copy.put(
        f"{name}.weight", copy.tensors[f"{name}.weight"] * copy.tensors[f"{name}.weight_scale"]
    )
    copy.drop(f"{name}.weight_scale")
    copy.config["quantization_config"]["ignore"].append("re:.*layers.0.mlp.down_proj")
    model = load(copy.write(tmp_path / "folder"))
    assert isinstance(model.layers[0].down, FloatLinear)
    assert isinstance(model.layers[1].down, DynamicInt8Linear)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"use_sliding_window": False}, (None, None)),
        ({"use_sliding_window": True, "layer_types": None, "max_window_layers": 1}, (None, 8)),
        ({"use_sliding_window": True, "layer_types": None, "max_window_layers": 9}, (None, None)),
        (
            {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
            (8, None),
        ),
    ],
)
def test_windows(changes, windows, tmp_path):
    copy = Copy("qwen2_float")
    copy.config |= {"sliding_window": 8} | changes
    assert load(copy.write(tmp_path / "folder")).config.windows == windows


@pytest.mark.parametrize(
    ("name", "changes"),
    [("mistral_float", {}), ("qwen2_float", {"use_sliding_window": True, "layer_types": None})],
)
def test_a_window_that_is_not_said(name, changes, tmp_path):
    """Null is none; without the key, nothing is guessed."""
    copy = Copy(name)
    copy.config |= changes | {"sliding_window": None}
    assert load(copy.write(tmp_path / "folder")).config.windows == (None, None)
    del copy.config["sliding_window"]
    with pytest.raises(checkpoints.CheckpointError, match='must have "sliding_window", null for'):
        load(copy.write(tmp_path / "without"))


LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 4.0,
            "short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "rope_theta": 1e4}  # fmt: skip


def test_a_prompt_for_a_longer_cache(tmp_path):
    """K of `forward_float` has the frequencies of the cache's rows, if they are given."""
    copy = Copy("llama3_float")
    copy.config["rope_parameters"] = LONGROPE
    model = load(copy.write(tmp_path / "folder"))
    tokens, rows = jnp.arange(12, dtype=jnp.int32)[None], 48
    cache = new_cache(model, 1, rows)
    expected, cache = forward(model, tokens, cache, jnp.zeros(1, jnp.int32))
    read = forward_float(model, tokens, rows=rows)
    np.testing.assert_allclose(read.logits, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(read.k[:, 0], cache.k[:, 0, :12], rtol=1e-4, atol=1e-5)
    assert not np.allclose(forward_float(model, tokens).k, read.k, atol=0.01)
    with pytest.raises(ValueError, match="`rows` must be at least S = 12, got 11"):
        forward_float(model, tokens, rows=11)


def test_end_tokens(tmp_path):
    copy = Copy("qwen2_float")
    copy.config["eos_token_id"] = [7, 8]
    assert load(copy.write(tmp_path / "folder")).config.end_tokens == (7, 8)


def test_biases_that_config_announces(tmp_path):
    copy = Copy("llama3_float")
    copy.config |= {"attention_bias": True, "mlp_bias": True}
    rng = np.random.default_rng(0)
    for key in list(copy.tensors):
        if "_proj.weight" in key:
            bias = rng.normal(size=len(copy.tensors[key])).astype(np.float32)
            copy.put(key.replace(".weight", ".bias"), bias)
    model = load(copy.write(tmp_path / "folder"))
    expected = float_decoder.logits(copy.config, copy.tensors, IDS)
    assert decoding.largest_error(decoding.at_once(model, IDS)[0], expected) < 1e-5


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_frequencies_that_old_files_hold(dtype, tmp_path):
    copy = Copy("mistral_float")
    frequencies = 1e4 ** -(np.arange(8) / 8)
    for i in range(2):
        name = f"model.layers.{i}.self_attn.rotary_emb.inv_freq"
        copy.put(name, frequencies.astype(dtype))
    assert_same(load(copy.write(tmp_path / "folder")), original("mistral_float"))
    copy.put(name, (frequencies * 1.1).astype(dtype))
    with pytest.raises(checkpoints.CheckpointError, match=rf"`{name}` must be the frequencies of"):
        load(copy.write(tmp_path / "folder"))


def test_progress(capsys):
    checkpoints.load(checkpoint_folder.FOLDERS / "llama3_float")
    assert "loading" in capsys.readouterr().err
    original("llama3_float")
    assert capsys.readouterr().err == ""
