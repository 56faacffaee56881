"""Scales of a model with partial rotary: files have its own order of K's channels, always."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from support.checkpoint_folder import Copy

from jax_kvcache import checkpoints
from jax_kvcache.__main__ import main
from jax_kvcache.checkpoints.load import with_scales
from jax_kvcache.model import forward_float


def partial_folder(name, tmp_path):
    copy = Copy(name)
    copy.config["partial_rotary_factor"] = 0.5
    return copy.write(tmp_path / "folder")


def assert_same(params, expected):
    assert sorted(params) == sorted(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(params[name], array)


def test_a_folders_scales_given_by_hand(tmp_path):
    folder = partial_folder("llama3_ascendv1_dynamic", tmp_path)
    model = checkpoints.load(folder, progress=False)
    bare = dataclasses.replace(model, cache_params=None)
    assert_same(with_scales(bare, folder).cache_params, model.cache_params)


def test_calibrate_writes_the_files_order(tmp_path):
    """A server that never permuted anything reads the scales of its own channels."""
    folder = partial_folder("llama3_float", tmp_path)
    model = checkpoints.load(folder, progress=False)
    tokens = np.arange(40, dtype=np.int32) * 5
    (tmp_path / "text").write_text(" ".join(map(str, tokens)))
    command = ["calibrate", "--model", str(folder), "--format", "ascend_v1", "--window", "40"]
    assert main([*command, "--out", str(tmp_path / "out"), str(tmp_path / "text")]) == 0
    calibrated = with_scales(model, tmp_path / "out")
    read = forward_float(model, jnp.asarray(tokens[None]))
    expected = np.abs(read.k).max((1, 2)) / 127
    np.testing.assert_allclose(calibrated.cache_params["scale_k"], expected, rtol=1e-3)
    checkpoints.save(calibrated, tmp_path / "saved")
    written = checkpoints.read_kv_scales(tmp_path / "out")
    assert_same(checkpoints.read_kv_scales(tmp_path / "saved"), written)
    assert np.abs(written["scale_k"] / expected - 1).max() > 0.1, "the order differs"
