"""Folders and files that were made to break their reader: what they get is an error with a name."""

import json
import struct

import numpy as np
import pytest
from support.checkpoint_folder import DESCRIPTION, Copy

from jax_kvcache import checkpoints
from jax_kvcache.checkpoints import CheckpointError, read_kv_scales, write_kv_scales

Q = "model.layers.0.self_attn.q_proj"
LONGROPE = {
    "rope_theta": 1e4,
    "rope_type": "longrope",
    "factor": 2.0,
    "short_factor": [1.0] * 16,
    "long_factor": [1.0] * 9,
    "original_max_position_embeddings": 64,
}
PARTIAL = {"rope_theta": 1e4, "partial_rotary_factor": 0.01}


def refusal(copy, tmp_path, quantize=None):
    """What `load` says of a folder."""
    folder = copy.write(tmp_path / "folder")
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(folder, quantize, progress=False)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "must be at most 10000, got 1000000000"),
        ({"head_dim": 2**40}, "must be at most 4096, got 1099511627776"),
        ({"vocab_size": 2**70}, "must be at most 2147483647, got 11805916"),
        ({"sliding_window": 2**40}, "must be at most 2147483647, got 1099511627776"),
        ({"architectures": [{}]}, "must be one of LlamaForCausalLM, "),
        ({"layer_types": [["a"], {}]}, "full_attention or sliding_attention, got [['a'], {}]"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "must be finite and above 0, got 1000"),
        ({"rope_parameters": PARTIAL}, "got 0.01 of `head_dim` = 32"),
        ({"rope_parameters": LONGROPE}, '["long_factor"]` must have r/2 = 16 numbers, got 9'),
    ],
)
def test_config(changes, message, tmp_path):
    copy = Copy("mistral_float")
    copy.config |= {"head_dim": 32, **changes}
    assert message in refusal(copy, tmp_path)


def test_a_key_that_is_there_twice(tmp_path):
    folder = Copy("llama3_ascendv1_dynamic").write(tmp_path / "folder")
    text = (folder / DESCRIPTION).read_text()
    (folder / DESCRIPTION).write_text(text[:-1] + f', "{Q}.weight": "FLOAT"}}')
    with pytest.raises(CheckpointError, match=rf'the key "{Q}.weight" must be there once'):
        checkpoints.load(folder, progress=False)


def test_a_shard_with_a_name_that_no_file_can_have(tmp_path):
    folder = Copy("llama3_float").write(tmp_path / "folder", 2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "x" * 5000 + ".safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"the shard 'x+\.safetensors' is missing"):
        checkpoints.load(folder, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ignore": ["re:("]}, "must have regular expressions after \"re:\", got 're:('"),
        ({"ignore": ["re:(.+)+x$"]}, "at most 4 repeats and 4 parentheses, none of them repeated"),
        ({"ignore": ["re:" + ".*" * 9]}, "at most 4 repeats and 4 parentheses"),
        ({"ignore": ["re:" + "(.|m)" * 40]}, "at most 4 repeats and 4 parentheses"),
        ({"ignore": [5]}, '"ignore" of "quantization_config" of config.json must be strings'),
        ({"transform_config": {"config_groups": {"R3": {}}}}, 'has the key "transform_config"'),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "must be 'dense' or null, got 'spa"),
    ],
)
def test_compressed_tensors(changes, message, tmp_path):
    copy = Copy("llama3_compressed_tensors")
    copy.config["quantization_config"] |= changes
    assert message in refusal(copy, tmp_path)


def test_keys_of_a_group(tmp_path):
    copy = Copy("llama3_compressed_tensors")
    group = copy.config["quantization_config"]["config_groups"]["group_0"]
    group["format"] = "pack-quantized"
    assert "must be 'int-quantized' or null, got 'pack-quantized'" in refusal(copy, tmp_path)
    group |= {"format": None, "rotation": "hadamard"}
    assert 'of config.json has the key "rotation"' in refusal(copy, tmp_path)


def test_harmless_keys_and_patterns(tmp_path):
    copy = Copy("llama3_compressed_tensors")
    facts = {"transform_config": {}, "sparsity_config": {"format": "dense"}, "version": "0.11.0"}
    copy.config["quantization_config"] |= {**facts, "ignore": ["re:.*lm_head$"]}
    checkpoints.load(copy.write(tmp_path / "folder"), progress=False)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(value, tmp_path):
    """Codes have no NaN: it would be gone, and the row with it."""
    copy = Copy("llama3_float")
    weight = copy.tensors[f"{Q}.weight"].copy()
    weight[3, 5] = value
    copy.put(f"{Q}.weight", weight)
    assert f"`{Q}.weight` must be finite, got {value}" in refusal(copy, tmp_path, "w8a8")
    for name, kind in (("model.norm.weight", "FLOAT"), (f"{Q}.bias", "FLOAT")):
        wrong = Copy("qwen2_ascendv1_dynamic")
        array = wrong.tensors[name].copy()
        array[1] = value
        wrong.put(name, array, kind)
        assert f"`{name}` must be finite, got {value}" in refusal(wrong, tmp_path)


def test_an_fp8_scale_of_the_cache(tmp_path):
    folder = Copy("mistral_ascendv1_dynamic").write(tmp_path / "folder")
    path = folder / "quant_model_weights.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = "model.layers.0.self_attn.k_proj.kv_cache_scale"
    shape = header[name]["shape"]
    header[name] |= {"dtype": "F8_E4M3", "shape": [4, *shape]}  # as many bytes as float32 has
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(folder, progress=False)
    assert f"`{name}` of 'quant_model_weights.safetensors' must be F32" in str(caught.value)
    assert "no int8 scale can be recovered from an fp8 one. Drop the cache's" in str(caught.value)


def test_a_number_of_many_digits(tmp_path):
    tokenizer = checkpoints.load_tokenizer(tmp_path, 256)
    with pytest.raises(ValueError, match=r"must be numbers of tokens in .*, got b'9999"):
        tokenizer.encode(b"9" * 5000)


ONNX = {"scales": {"k_scales": [[1.0] * 16] * 2, "v_scales": [[1.0] * 16] * 2}, "layer_ids": [0, 1]}


def of_k(scales):
    return ONNX | {"scales": ONNX["scales"] | {"k_scales": scales}}


@pytest.mark.parametrize(
    ("content", "heads", "message"),
    [
        (ONNX, 0, "`num_kv_heads` must be an int above 0, got 0"),
        (ONNX, -1, "`num_kv_heads` must be an int above 0, got -1"),
        (ONNX, "2", "`num_kv_heads` must be an int above 0, got '2'"),
        (ONNX | {"layer_ids": 5}, 2, "a list of numbers for each layer: TypeError"),
        (of_k([[10**400] * 16] * 2), 2, "a list of numbers for each layer: TypeError"),
        (of_k([["0.1"] * 16] * 2), 2, "a list of numbers for each layer: TypeError"),
        (of_k([[1e300] * 16] * 2), 2, "`k_scales` must be finite, normal and above 0, got inf"),
        (of_k([[1.0] * 8] * 2), 2, r"must have one shape, got \[2, 8\] and \[2, 16\]"),
    ],
)
def test_json_of_scales(content, heads, message, tmp_path):
    path = tmp_path / "scales.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_kv_scales(path, num_kv_heads=heads)


def per_tensor(layers=3):
    return {f"scale_{n}": np.full((layers, 2, 8), 0.5, np.float32) for n in "kv"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": -4}, '"head_dim" of .* must be above 0, got -4'),
        ({"head_dim": 10**10}, '"head_dim" of .* must be at most 4096, got 10000000000'),
        ({"num_key_value_heads": 10**6}, '"num_key_value_heads" of .* must be at most 4096'),
        ({"num_key_value_heads": "2"}, '"num_key_value_heads" of .* must be int'),
        ({"head_dim": None, "hidden_size": 17}, 'must have "head_dim": "hidden_size" = 17 is no'),
        ({"num_hidden_layers": 10**9}, '"num_hidden_layers" of .* must be at most 10000'),
        ({"num_hidden_layers": 2}, r"2 layers, and no place is left for `model\.layers\.2\.self_a"),
    ],
)
@pytest.mark.parametrize("format", ["compressed_tensors", "ascend_v1"])
def test_folders_of_scales(changes, message, format, tmp_path):
    write_kv_scales(tmp_path / "s", per_tensor(), format)
    path = tmp_path / "s" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        read_kv_scales(tmp_path / "s")


def test_npz_of_more_layers(tmp_path):
    write_kv_scales(tmp_path / "s", per_tensor(), "npz")
    with pytest.raises(ValueError, match=r"hold 2 layers, .* holds 'layers\.2\.scale_k' too"):
        read_kv_scales(tmp_path / "s", shape=(2, 2, 8))


@pytest.mark.parametrize("format", ["npz", "ascend_v1"])
def test_a_shape_may_be_a_list(format, tmp_path):
    write_kv_scales(tmp_path / "s", per_tensor(), format)
    assert read_kv_scales(tmp_path / "s", shape=[3, 2, 8])["scale_k"].shape == (3, 2, 8)


def test_nothing_is_written_that_cannot_be_read(tmp_path):
    one = per_tensor() | {"offset_k": np.ones((3, 2, 8))}
    with pytest.raises(ValueError, match="must have offset_k and offset_v together, or neither"):
        write_kv_scales(tmp_path / "s", one, "npz")
    with pytest.raises(ValueError, match=r"`scale_k` must have numbers, got shape \[0, 2, 8\]"):
        write_kv_scales(tmp_path / "s", per_tensor(0), "npz")
