"""The advice of errors about files: what they say to change is changed, and then it works."""

import numpy as np
import pytest
from support import checkpoint_folder
from support.checkpoint_folder import Copy

from jax_kvcache import __main__, checkpoints
from jax_kvcache.checkpoints import load, read_kv_scales, write_kv_scales

L, Nkv, D = 2, 2, 8
SCALE = np.random.default_rng(0).uniform(0.1, 1, (L, Nkv, D)).astype(np.float32)
SCALES = {"scale_k": SCALE, "scale_v": 2 * SCALE}
OFFSETS = {"offset_k": SCALE, "offset_v": SCALE}


def write(path, scales=SCALES, format="npz", **more):
    write_kv_scales(path / "scales", scales, format, **more)


def test_formats_without_offsets(tmp_path):
    advice = 'calibrate without offsets, or use "ascend_v1" or "npz"'
    for format in ("onnxruntime", "compressed_tensors"):
        with pytest.raises(ValueError, match=advice):
            write(tmp_path, SCALES | OFFSETS, format, reduce="max")
        write_kv_scales(tmp_path / format, SCALES, format, reduce="max")
    for format in ("ascend_v1", "npz"):
        write_kv_scales(tmp_path / format, SCALES | OFFSETS, format)


def test_a_format_with_one_scale_per_head(tmp_path):
    with pytest.raises(ValueError, match='`reduce="max"` takes the largest of each head'):
        write(tmp_path, format="compressed_tensors")
    write(tmp_path, format="compressed_tensors", reduce="max")
    np.testing.assert_array_equal(
        read_kv_scales(tmp_path / "scales")["scale_k"][..., 0], SCALE.max(-1)
    )


def test_a_new_or_an_empty_folder(tmp_path):
    write(tmp_path, format="ascend_v1")
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        write(tmp_path, format="ascend_v1")
    (tmp_path / "scales" / "empty").mkdir()
    write_kv_scales(tmp_path / "scales" / "empty", SCALES, "ascend_v1")


def test_a_file_that_does_not_say_the_heads(tmp_path):
    write(tmp_path, format="onnxruntime")
    with pytest.raises(ValueError, match="`num_kv_heads` must be given"):
        read_kv_scales(tmp_path / "scales")
    assert read_kv_scales(tmp_path / "scales", num_kv_heads=Nkv)["scale_v"].shape == (L, Nkv, D)


@pytest.mark.parametrize("name", ["llama3_float", "llama3_ascendv1_dynamic"])
def test_scales_that_a_folder_does_not_have(name, tmp_path):
    """`calibrate` makes scales of the folder's model, which the command line and `load` take."""
    folder = Copy(name)
    for key in [key for key in folder.tensors if "kv_cache" in key]:
        folder.drop(key)
    if folder.description is not None:
        for key in ("kv_cache_type", "kv_quant_type"):
            folder.description.pop(key, None)
    path = folder.write(tmp_path / "folder")
    with pytest.raises(ValueError, match="Make them with `python -m jax_kvcache calibrate`"):
        read_kv_scales(path)
    text, out = tmp_path / "text", tmp_path / "scales.npz"
    text.write_text(" ".join(map(str, range(64))))
    command = ["calibrate", str(text), "--model", str(path), "--out", str(out)]
    assert __main__.main(command) == 0
    model = load(path, progress=False).config
    shape = (model.n_layers, model.n_kv_heads, model.head_dim)
    assert read_kv_scales(out, shape=shape)["scale_k"].shape == shape


def refused(folder, message, **options):
    with pytest.raises(checkpoints.CheckpointError, match=message):
        load(folder, progress=False, **options)


def test_an_fp8_cache(tmp_path):
    copy = Copy("llama3_compressed_tensors")
    quantization = copy.config["quantization_config"]
    quantization["kv_cache_scheme"] = {"type": "float", "num_bits": 8}
    refused(copy.write(tmp_path / "a"), "Set it to null, drop k_scale and v_scale, and make scales")
    quantization["kv_cache_scheme"] = None
    for name in [name for name in copy.tensors if name.endswith(("k_scale", "v_scale"))]:
        copy.drop(name)
    assert load(copy.write(tmp_path / "b"), progress=False).cache_params is None


def test_an_output_matrix_that_is_not_the_embedding(tmp_path):
    copy = Copy("llama3_float")
    copy.config["tie_word_embeddings"] = True
    copy.put("lm_head.weight", copy.tensors["model.embed_tokens.weight"] + 1)
    refused(
        copy.write(tmp_path / "a"), '"tie_word_embeddings": true, and does not. Set it to false'
    )
    copy.config["tie_word_embeddings"] = False
    load(copy.write(tmp_path / "b"), progress=False)


def test_frequencies_of_another_theta(tmp_path):
    copy = Copy("llama3_float")
    dim, theta = copy.config["head_dim"], 777.0
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    copy.put(name, (theta ** -(np.arange(0, dim, 2) / dim)).astype(np.float32))
    refused(copy.write(tmp_path / "a"), "Correct config.json, or drop the tensor")
    copy.drop(name)
    load(copy.write(tmp_path / "b"), progress=False)


def test_a_folder_that_is_quantised_already():
    folder = checkpoint_folder.FOLDERS / "llama3_ascendv1_static"
    refused(folder, "`quantize` must be None for a folder that is quantised", quantize="w8a8")
    load(folder, None, progress=False)
