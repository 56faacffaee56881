"""Scales of a cache in every format: read, written, read back to the bit, and refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from support import checkpoint_folder
from support.checkpoint_folder import Copy

from jax_kvcache import KVCache, checkpoints
from jax_kvcache.__main__ import main
from jax_kvcache.checkpoints import CheckpointError, read_kv_scales, write_kv_scales
from jax_kvcache.cli.output import output_folder

L, Nkv, D = 3, 2, 8
RNG = np.random.default_rng(0)


def scales(offsets=False, per="channel"):
    """Random float32 scales, with and without offsets."""
    shape = {"channel": (L, Nkv, D), "head": (L, Nkv, 1), "tensor": (L, 1, 1)}[per]
    made = {}
    for n in "kv":
        made[f"scale_{n}"] = np.broadcast_to(RNG.uniform(0.01, 0.1, shape), (L, Nkv, D))
    if offsets:
        made |= {f"offset_{n}": RNG.normal(size=(L, Nkv, D)) * 9 for n in "kv"}
    return {n: a.astype(np.float32) for n, a in made.items()}


def assert_same(read, written):
    assert sorted(read) == sorted(written)
    for name, array in written.items():
        assert read[name].dtype == np.float32
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize(
    ("format", "given"),
    [
        ("npz", scales()),
        ("npz", scales(offsets=True)),
        ("onnxruntime", scales()),
        ("ascend_v1", scales()),
        ("ascend_v1", scales(offsets=True)),
        ("compressed_tensors", scales(per="head")),
        ("compressed_tensors", scales(per="tensor")),
    ],
)
def test_written_and_read_back(format, given, tmp_path):
    path = tmp_path / "scales"
    write_kv_scales(path, given, format)
    read = read_kv_scales(path, num_kv_heads=Nkv)
    assert_same(read, given)
    assert_same(read_kv_scales(path, shape=(L, Nkv, D)), given)
    KVCache.create(1, 4, Nkv, D, layers=L, **read)  # no other form


def test_jax_arrays_and_offsets_of_zero(tmp_path):
    given = {n: jnp.asarray(a) for n, a in scales().items()}
    zeros = {f"offset_{n}": jnp.zeros((L, Nkv, D)) for n in "kv"}
    for format in ("npz", "onnxruntime", "ascend_v1"):
        write_kv_scales(tmp_path / format, given | zeros, format)
        assert_same(read_kv_scales(tmp_path / format, num_kv_heads=Nkv), scales_of(given))


def scales_of(given):
    return {n: np.asarray(a) for n, a in given.items()}


def test_names_and_shapes_of_each_format(tmp_path):
    given = scales(per="head")
    write_kv_scales(tmp_path / "a", given, "ascend_v1")
    tensors = checkpoint_folder.read_tensors(tmp_path / "a")
    name = "model.layers.2.self_attn.v_proj.kv_cache_scale"
    assert tensors[name].shape == (Nkv * D,)
    description = json.loads((tmp_path / "a" / "quant_model_description.json").read_text())
    assert description[name] == description["kv_cache_type"] == "C8"
    write_kv_scales(tmp_path / "c", given, "compressed_tensors")
    tensors = checkpoint_folder.read_tensors(tmp_path / "c")
    assert tensors["model.layers.0.self_attn.k_scale"].shape == (Nkv, 1, 1)
    config = json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["strategy"] == "attn_head"
    write_kv_scales(tmp_path / "o", given, "onnxruntime")
    content = json.loads((tmp_path / "o").read_text())
    assert content["layer_ids"] == [0, 1, 2]
    assert np.shape(content["scales"]["k_scales"]) == (L, Nkv * D)


@pytest.mark.parametrize("before", [b"\xef\xbb\xbf", b" \n" * 100])
def test_json_of_other_editors(before, tmp_path):
    given = scales()
    write_kv_scales(tmp_path / "a", given, "onnxruntime")
    (tmp_path / "b").write_bytes(before + (tmp_path / "a").read_bytes())
    assert_same(read_kv_scales(tmp_path / "b", num_kv_heads=Nkv), scales_of(given))


def test_a_folder_that_nothing_was_written_to(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("there", "new"):
        with pytest.raises(KeyError), output_folder(str(tmp_path / name)):
            raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_reduce(tmp_path):
    given = scales()
    write_kv_scales(tmp_path / "c", given, "compressed_tensors", reduce="max")
    read = read_kv_scales(tmp_path / "c")
    for name, array in given.items():
        expected = np.broadcast_to(array.max(-1, keepdims=True), array.shape)
        np.testing.assert_array_equal(read[name], expected)


@pytest.mark.parametrize("name", checkpoint_folder.NAMES)
def test_of_the_folders(name):
    folder = checkpoint_folder.FOLDERS / name
    if "ascendv1" not in name:
        with pytest.raises(CheckpointError, match="must have scales for a cache"):
            read_kv_scales(folder)
        return
    params = checkpoints.load(folder, progress=False).cache_params
    assert_same(read_kv_scales(folder), scales_of(params))


def test_of_the_demo():
    read = read_kv_scales(checkpoints.demo_folder())
    assert read["scale_k"].shape == (4, 2, 64)


@pytest.mark.parametrize(
    ("given", "format", "options", "message"),
    [
        (scales(), "gguf", {}, "`format` must be one of npz, onnxruntime, ascend_v1, compressed"),
        (scales(), "npz", {"reduce": "mean"}, "`reduce` must be None or \"max\", got 'mean'"),
        (scales(offsets=True), "onnxruntime", {}, "holds no offsets, and `offset_k` is not 0: cal"),
        (scales(offsets=True), "compressed_tensors", {"reduce": "max"}, "holds no offsets, and `o"),
        (scales(), "compressed_tensors", {}, "one scale per head or per tensor, and `scale_k` has "
         'one per channel: `reduce="max"` takes'),
        ({"scale_k": scales()["scale_k"]}, "npz", {}, "must have scale_k and scale_v, and may"),
        (scales() | {"zero_k": 1}, "npz", {}, "must have scale_k and scale_v, and may"),
        (scales() | {"scale_v": np.ones((L, D))}, "npz", {}, "`scale_v` must have shape [L, Nkv, "
         "D] = [3, 2, 8], got [3, 8]"),
        (scales() | {"scale_v": np.zeros((L, Nkv, D))}, "npz", {}, "`scale_v` must be finite, and"),
    ],
)  # fmt: skip
def test_refuses_to_write(given, format, options, message, tmp_path):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        write_kv_scales(tmp_path / "scales", given, format, **options)
    assert message in str(caught.value)
    assert not (tmp_path / "scales").exists()


def test_refuses_a_folder_with_files(tmp_path):
    with pytest.raises(ValueError, match=r"must be a new or an empty folder, and '.*' holds files"):
        write_kv_scales(checkpoints.demo_folder(), scales(), "ascend_v1")


ONNX = {"scales": {"k_scales": [[1.0] * 16] * 2, "v_scales": [[1.0] * 16] * 2}, "layer_ids": [0, 1]}


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (ONNX, {}, "`num_kv_heads` must be given, since"),
        (ONNX, {"shape": (3, 2, 8)}, r"must have shape \[L, Nkv \* D\] = \[3, 16\], got \[2, 16\]"),
        (ONNX, {"num_kv_heads": 3}, r"must have shape \[L, Nkv \* D\] = \[2, 15\], got \[2, 16\]"),
        (ONNX | {"layer_ids": [1, 2]}, {"num_kv_heads": 2}, '"layer_ids" of .* must be 0, 1 and'),
        ({"scales": {}}, {}, 'must be JSON with "layer_ids" and with "scales"'),
        (
            ONNX | {"scales": ONNX["scales"] | {"v_scales": [[1.0] * 16, [0.0] * 16]}},
            {"num_kv_heads": 2},
            "`v_scales` must be finite, normal and above 0, got 0.0",
        ),
    ],
)
def test_refuses_json(content, options, message, tmp_path):
    path = tmp_path / "scales.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_kv_scales(path, **options)


def test_refuses_scales_of_another_shape():
    folder = checkpoint_folder.FOLDERS / "qwen2_ascendv1_static"
    with pytest.raises(ValueError, match=r"= \[2, 2, 32\], got \[2, 2, 16\]"):
        read_kv_scales(folder, shape=(2, 2, 32))


@pytest.mark.parametrize("format", ["ascend_v1", "compressed_tensors", "onnxruntime"])
def test_calibrate_writes_each(format, tmp_path, capsys):
    """And eval takes it. The scales printed beside their cost are those of the file."""
    folder = Copy("qwen3_float").write(tmp_path / "folder")
    text, out = tmp_path / "text", tmp_path / "scales"
    text.write_text(" ".join(map(str, RNG.integers(0, 256, 100))))
    options = ["--model", str(folder), "--window", "50", str(text)]
    reduce = ["--reduce", "max"] if format == "compressed_tensors" else []
    command = ["calibrate", *options, "--out", str(out), "--format", format]
    assert main([*command, *reduce]) == 0
    scale = read_kv_scales(out, num_kv_heads=2)["scale_k"]
    assert scale.shape == (2, 2, 32)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    ranges = [line[3:6] for line in printed if line[1] == "k"]
    assert ranges == [[f"{s.min():.5f}", "..", f"{s.max():.5f}"] for s in scale]
    assert main(["eval", *options, "--scales", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["nll_int8_cache"] is not None
