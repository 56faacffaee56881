"""What a folder that cannot be read gets: its own error with name, expected, got and the fix."""

import json
import struct

import numpy as np
import pytest
from support import checkpoint_folder
from support.checkpoint_folder import DESCRIPTION, Copy

from jax_kvcache import checkpoints
from jax_kvcache.checkpoints import CheckpointError

Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.1.self_attn.k_proj"


def error_of(folder, **options):
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(folder, progress=False, **options)
    return str(caught.value)


def changed(name, change, tmp_path):
    copy = Copy(name)
    change(copy)
    return copy.write(tmp_path / "folder")


def put(name, value, kind=None):
    return lambda copy: copy.put(name, value, kind)


def entry(name, kind):
    return lambda copy: copy.description.update({name: kind})


def config(**changes):
    return lambda copy: copy.config.update(changes)


def quantization(**changes):
    return lambda copy: copy.config["quantization_config"].update(changes)


def scheme(which, **changes):
    def change(copy):
        groups = copy.config["quantization_config"]["config_groups"]
        groups["group_0"][which] |= changes

    return change


def drop_scale(copy):
    del copy.tensors[f"{Q}.weight_scale"]


def mixed_input_scales(copy):
    copy.put(f"{K}.input_scale", np.array([0.5], np.float32), "W8A8")


def high_bits(copy):
    copy.tensors[f"{Q}.deq_scale"][3] |= 1 << 40


def an_offset(copy):
    copy.tensors[f"{Q}.weight_offset"][5] = 2


ASCEND = [
    ("static", entry(f"{Q}.weight", "W4A8"), f"`{Q}.weight` has the type 'W4A8'; known are FLOAT"),
    ("dynamic", an_offset, f"`{Q}.weight_offset` must be 0, got 2.0: weights with an offset"),
    (
        "static",
        mixed_input_scales,
        "`model.layers.1.self_attn.q_proj`, `k_proj` and `v_proj` read one input and must have "
        "one `input_scale`, got 0.0",
    ),
    ("static", high_bits, f"`{Q}.deq_scale` must hold float32's bits in the low half of each int6"),
    (
        "static",
        put(f"{Q}.input_scale", np.array([0], np.float32), "W8A8"),
        f"`{Q}.input_scale` must be finite, normal and above 0, got 0.0",
    ),
    (
        "static",
        put(f"{Q}.input_scale", np.ones(2, np.float32), "W8A8"),
        f"`{Q}.input_scale` of 'quant_model_weights.safetensors' must have shape [1], got [2]",
    ),
    (
        "static",
        put(f"{Q}.quant_bias", np.zeros(128, np.float32), "W8A8"),
        f"`{Q}.quant_bias` of 'quant_model_weights.safetensors' must be I32, got F32",
    ),
    (
        "dynamic",
        put(f"{Q}.weight", np.zeros((64, 128), np.int8), "W8A8_DYNAMIC"),
        f"`{Q}.weight` of 'quant_model_weights.safetensors' must have shape [128, 64], got [64, 12",
    ),
    (
        "dynamic",
        put(f"{Q}.weight_scale", np.full((128, 1), np.nan, np.float32), "W8A8_DYNAMIC"),
        f"`{Q}.weight_scale` must be finite, got nan",
    ),
    (
        "dynamic",
        drop_scale,
        f"`{Q}.weight_scale` of type W8A8_DYNAMIC is in 'quant_model_descripti",
    ),
    (
        "dynamic",
        lambda copy: copy.drop(f"{Q}.weight_scale"),
        f"`{Q}.weight_scale` is missing: expected F32 or F16 or BF16 of shape [128, 1] or [128]; "
        f"the files hold {Q}.weight",
    ),
    (
        "dynamic",
        lambda copy: copy.description.pop(f"{Q}.weight_scale"),
        f"`{Q}.weight_scale` (F32) is in 'quant_model_weights.safetensors' and "
        "'quant_model_description.json' does not say of which type it is",
    ),
    (
        "dynamic",
        entry(f"{Q}.weight_scale", "W8A8"),
        f"`{Q}.weight_scale` must have the type W8A8_DYNAMIC, got W8A8",
    ),
    ("dynamic", entry(f"{Q}.weight", "C8"), f"`{Q}.weight` must have the type FLOAT or W8A8 or"),
    (
        "dynamic",
        entry("model.norm.weight", "W8A8"),
        "`model.norm.weight` must have the type FLOAT, got W8A8",
    ),
    (
        "dynamic",
        put("model.norm.bias", np.zeros(64, np.float32), "FLOAT"),
        "the model has no place for 1 tensors: `model.norm.bias` (F32)",
    ),
    (
        "static",
        lambda copy: copy.drop(f"{K}.kv_cache_scale"),
        f"`{K}.kv_cache_scale` is missing: expected F32 or F16 or BF16 of shape [64]",
    ),
    (
        "static",
        put(f"{K}.kv_cache_scale", np.zeros(64, np.float16), "C8"),
        f"`{K}.kv_cache_scale` must be finite, normal and above 0, got 0.0",
    ),
    (
        "static",
        entry(f"{K}.kv_cache_scale", "FLOAT"),
        f"`{K}.kv_cache_scale` must have the type C8, got FLOAT",
    ),
    ("static", entry("version", "2.0.0"), "must be '1.0.0', got '2.0.0'"),
    ("static", entry("kv_quant_type", "C4"), '"kv_quant_type" of \''),
    ("static", entry("model_quant_type", "W4A4"), "must be 'FLOAT' or 'W8A8' or"),
    ("static", entry("group_size", "many"), "must be int, got 'many'"),
    (
        "static",
        entry("fa_quant_type", "FAQuant"),
        "is neither a tensor of a known type nor known of the whole model, got 'FAQuant'",
    ),
    (
        "static",
        config(quantization_config={"quant_method": "compressed-tensors"}),
        "must have one format, got both",
    ),
]


@pytest.mark.parametrize(("form", "change", "message"), ASCEND, ids=[m[:40] for *_, m in ASCEND])
def test_ascend_v1(form, change, message, tmp_path):
    assert message in error_of(changed(f"llama3_ascendv1_{form}", change, tmp_path))


FLOAT_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False,
               "symmetric": True}  # fmt: skip
COMPRESSED = [
    (quantization(format="pack-quantized"), "\"format\" of \"quantization_config\" of config.json "
     "must be 'int-quantized', got 'pack-quantized'"),
    (quantization(quant_method="gptq"), 'must be "compressed-tensors", got \'gptq\''),
    (quantization(config_groups={}), "must have one group, got []"),
    (quantization(kv_cache_scheme=FLOAT_CACHE), 'has "type" float: an fp8 cache, and no int8 '
     "scale can be recovered from its scales"),
    (quantization(kv_cache_scheme=FLOAT_CACHE | {"type": "int", "strategy": "channel"}),
     '"kv_cache_scheme" of "quantization_config" of config.json must be'),
    (quantization(kv_cache_scheme=FLOAT_CACHE | {"type": "int"}),
     "`model.layers.0.self_attn.k_scale` is missing: expected F32 or F16 or BF16 of shape [1]"),
    (scheme("weights", num_bits=4), '"weights" of "group_0" of "quantization_config" of config'),
    (scheme("weights", symmetric=False), "'symmetric': False"),
    (scheme("input_activations", strategy="group", group_size=32), "'group_size': 32"),
    (put("model.layers.0.self_attn.k_scale", np.ones(1, np.float32)), "the model has no place for "
     "1 tensors: `model.layers.0.self_attn.k_scale` (F32)"),
    (put(f"{Q}.weight_zero_point", np.zeros((128, 1), np.int8)), f"`{Q}.weight_zero_point` (I8)"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), COMPRESSED, ids=[m[:40] for _, m in COMPRESSED])
def test_compressed_tensors(change, message, tmp_path):
    assert message in error_of(changed("llama3_compressed_tensors", change, tmp_path))


CONFIGS = [
    (config(architectures=["GemmaForCausalLM"]), '"architectures" of \'', "must be one of LlamaFor"
     "CausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, got ['GemmaForCausalLM']"),
    (config(architectures=None), '"architectures"', "got None"),
    (config(hidden_act="gelu"), '"hidden_act"', 'must be "silu", got \'gelu\''),
    (config(hidden_size="64"), '"hidden_size"', "must be int, got '64'"),
    (config(hidden_size=None), "config.json'", 'must have "hidden_size", and does not'),
    (config(num_hidden_layers=0), '"num_hidden_layers"', "must be above 0, got 0"),
    (config(num_hidden_layers=3), "`model.layers.2.", "is missing"),
    (config(num_hidden_layers=1), "the model has no place for 9 tensors: `model.layers.1.", "more"),
    (config(num_key_value_heads=3), '"num_key_value_heads"', "got 4, 3 and 32"),
    (config(head_dim=None, num_attention_heads=5), '"head_dim"', '"hidden_size" = 64 is no mult'),
    (config(rms_norm_eps=None), '"rms_norm_eps"', "must be in [0, 1), got None"),
    (config(vocab_size=100), "`model.embed_tokens.weight`", "must have shape [100, 64], got [256,"),
    (config(rope_parameters=None), "config.json'", 'must have "rope_theta", and does not'),
    (config(rope_parameters={"rope_type": "mrope", "rope_theta": 1e4}), "RoPE of", "mrope"),
    (config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1]}),
     "RoPE of", 'the key "mrope_section"'),
    (config(rope_theta=1e4), '"rope_theta"', "got 10000.0 and 500000.0"),
    (config(rope_scaling={"type": "linear", "factor": 2.0}), '"rope_scaling"', "and they differ"),
    (config(tie_word_embeddings=True), "`lm_head.weight` must equal", "Set it to false"),
    (config(eos_token_id="</s>"), '"eos_token_id"', "must be int or list, got '</s>'"),
    (config(layer_types=["sliding_attention"] * 2), '"layer_types"', "must be 2 times full_att"),
    (config(quantization_config={"quant_method": "fp8"}), '"quant_method"', "got 'fp8'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "name", "message"), CONFIGS, ids=[m[:40] for *_, m in CONFIGS])
def test_config(change, name, message, tmp_path):
    error = error_of(changed("llama3_float", change, tmp_path))
    assert name in error
    assert message in error


def test_a_missing_bias(tmp_path):
    folder = changed("qwen2_float", lambda copy: copy.drop(f"{Q}.bias"), tmp_path)
    assert f"`{Q}.bias` is missing: expected F32 or F16 or BF16 of shape [64]" in error_of(folder)


def test_modelopt(tmp_path):
    folder = Copy("llama3_float").write(tmp_path / "folder")
    facts = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(facts))
    error = error_of(folder)
    assert "is of ModelOpt, with \"kv_cache_quant_algo\" 'FP8': no int8 scale can be" in error
    assert "calibrate" in error


def test_scales_for_some_layers(tmp_path):
    def change(copy):
        del copy.description["kv_cache_type"], copy.description["kv_quant_type"]
        for name in [name for name in copy.tensors if "layers.1." in name and "kv_cache" in name]:
            copy.drop(name)

    folder = changed("llama3_ascendv1_static", change, tmp_path)
    assert "every layer must have scales for the cache, and layer 1 has none" in error_of(folder)


def test_quantize(tmp_path):
    for name, kind in (("llama3_ascendv1_static", "AscendV1"),
                       ("llama3_compressed_tensors", "compressed-tensors")):  # fmt: skip
        error = error_of(checkpoint_folder.FOLDERS / name, quantize="w8a8")
        assert f"quantised already, got 'w8a8' for one of {kind}" in error
    with pytest.raises(ValueError, match="`quantize` must be None or \"w8a8\", got 'int4'"):
        checkpoints.load(tmp_path, "int4")


def raw_file(path, tensors):
    """A safetensors file by the format's definition, of dtypes that NumPy does not have."""
    header, body = {}, b""
    for name, (dtype, shape, data) in tensors.items():
        offsets = [len(body), len(body) + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


NAMES = {"float32": "F32", "int8": "I8", "bfloat16": "BF16"}


def with_fp8(copy, name, shape):
    """The folder's tensors, one of them fp8."""
    tensors = {
        n: (NAMES[a.dtype.name], list(a.shape), a.tobytes()) for n, a in copy.tensors.items()
    }
    return tensors | {name: ("F8_E4M3", shape, bytes(np.prod(shape)))}


def test_an_fp8_tensor(tmp_path):
    copy = Copy("llama3_float")
    folder = copy.write(tmp_path / "folder")
    raw_file(folder / "model.safetensors", with_fp8(copy, f"{Q}.weight", [128, 64]))
    error = error_of(folder)
    assert f"`{Q}.weight` of 'model.safetensors' must be F32 or F16 or BF16, got F8_E4M3" in error
    assert '`quantize="w8a8"`' in error


def test_an_fp8_scale(tmp_path):
    copy = Copy("llama3_float")
    folder = copy.write(tmp_path / "folder")
    name = f"{K}.k_scale"
    raw_file(folder / "model.safetensors", with_fp8(copy, name, [1]))
    error = error_of(folder)
    assert f"no place for 1 tensors: `{name}` (F8_E4M3)" in error
    assert "of fp8 cannot be used: drop them and make scales" in error


def test_no_folder_and_no_files(tmp_path):
    assert f"got '{tmp_path / 'no'}', which is none" in error_of(tmp_path / "no")
    assert "must hold the file 'config.json', and does not" in error_of(tmp_path)
    copy = Copy("llama3_float")
    folder = copy.write(tmp_path / "folder")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = error_of(folder)
    assert "must hold 'model.safetensors', or shards and 'model.safetensors.index.json'" in error
    assert "it holds config.json, pytorch_model.bin" in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has at least 8 bytes, got 0"),
        (b"1234567", "has at least 8 bytes, got 7"),
        (struct.pack("<Q", 2**60) + b"{}", f"10 bytes, got a header of {2**60} bytes; the file is"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", f"got a header of {2**64 - 1} bytes"),
        (struct.pack("<Q", 50) + b"{}", "got a header of 50 bytes; the file is truncated or not"),
        (struct.pack("<Q", 2) + b"xx", "invalid JSON in header"),
        (struct.pack("<Q", 2) + b"{}and more", "(18 bytes; truncated, or damaged"),
        (b"PK\3\4" + bytes(60), "header"),
    ],
)
def test_a_damaged_file(content, message, tmp_path):
    folder = Copy("llama3_float").write(tmp_path / "folder")
    (folder / "model.safetensors").write_bytes(content)
    error = error_of(folder)
    assert f"cannot read '{folder / 'model.safetensors'}'" in error
    assert message in error


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_truncated_file(share, tmp_path):
    folder = Copy("llama3_float").write(tmp_path / "folder")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert "truncated" in error_of(folder)


def test_hostile_offsets(tmp_path):
    folder = Copy("llama3_float").write(tmp_path / "folder")
    for offsets, shape in (([0, 2**63], [2**61]), ([0, 16], [2**32, 2**32]), ([8, 0], [2])):
        header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}
        text = json.dumps(header).encode()
        content = struct.pack("<Q", len(text)) + text + bytes(16)
        (folder / "model.safetensors").write_bytes(content)
        assert "cannot read" in error_of(folder)


def index_of(folder):
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", 7]
)
def test_an_index_names_files_of_the_folder_alone(file, tmp_path):
    (tmp_path / "secret.safetensors").write_bytes(b"")
    folder = Copy("llama3_float").write(tmp_path / "folder", 2)
    index = json.loads(index_of(folder).read_text())
    index["weight_map"][f"{Q}.weight"] = file
    index_of(folder).write_text(json.dumps(index))
    error = error_of(folder)
    assert f"`{Q}.weight` must be in a file of the folder itself, got {file!r}" in error


def test_shards_and_index_disagree(tmp_path):
    copy = Copy("llama3_float")
    folder = copy.write(tmp_path / "folder", 2)
    index = json.loads(index_of(folder).read_text())
    names, (first, second) = index["weight_map"], (copy.shard(i, 2) for i in range(2))

    def error_with(weight_map):
        index_of(folder).write_text(json.dumps({"weight_map": weight_map}))
        return error_of(folder)

    name = next(n for n, file in names.items() if file == first)
    message = f"`{name}` must be in '{second}' by '{index_of(folder)}', got it in {first}"
    assert message in error_with(names | {name: second})
    assert "`ghost` must be in" in error_with(names | {"ghost": first})
    left = {n: file for n, file in names.items() if n != name}
    assert f"does not name {name} of its shards" in error_with(left)
    assert 'must have an object "weight_map"' in error_with([])
    index_of(folder).write_text("[")
    assert "must be JSON" in error_of(folder)
    index_of(folder).write_text("[]")
    assert "must hold a JSON object, got list" in error_of(folder)
    index_of(folder).write_text("[" * 100_000)
    assert "must be JSON" in error_of(folder)
    index_of(folder).write_text(json.dumps(index))
    (folder / second).unlink()
    error = error_of(folder)
    assert f"the shard '{second}' is missing from '{folder}'" in error
    assert "Download it again" in error
    (folder / "model.safetensors").write_bytes(b"")
    assert "must hold either 'model.safetensors' or" in error_of(folder)


def test_one_tensor_in_two_shards(tmp_path):
    copy = Copy("llama3_float")
    folder = copy.write(tmp_path / "folder", 2)
    name = next(iter(copy.tensors))
    path = folder / copy.shard(1, 2)
    zeros = bytes(copy.tensors[name].nbytes)
    raw_file(path, {name: ("F32", list(copy.tensors[name].shape), zeros)})
    assert f"`{name}` must be in one file" in error_of(folder)


def test_a_huge_json_file(tmp_path):
    folder = Copy("llama3_float").write(tmp_path / "folder")
    with (folder / "config.json").open("ab") as file:
        file.truncate(2 << 30)  # no byte of it is on the disk
    assert f"must have at most {100 << 20} bytes, got {2 << 30}" in error_of(folder)


def test_a_description_that_is_no_object(tmp_path):
    folder = Copy("llama3_ascendv1_static").write(tmp_path / "folder")
    (folder / DESCRIPTION).write_text('"W8A8"')
    assert "must hold a JSON object, got str" in error_of(folder)


def test_float64_weights(tmp_path):
    copy = Copy("llama3_float")
    copy.put(f"{Q}.weight", copy.tensors[f"{Q}.weight"].astype(np.float64))
    error = error_of(copy.write(tmp_path / "folder"))
    assert f"`{Q}.weight` of 'model.safetensors' must be F32 or F16 or BF16, got F64" in error


def test_int8_weights_without_a_description(tmp_path):
    """A folder whose description is lost is no float folder."""
    folder = Copy("llama3_ascendv1_dynamic").write(tmp_path / "folder")
    (folder / DESCRIPTION).unlink()
    (folder / "quant_model_weights.safetensors").rename(folder / "model.safetensors")
    assert "must be F32 or F16 or BF16, got I8" in error_of(folder)
