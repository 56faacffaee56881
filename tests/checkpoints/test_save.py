"""A saved model is the vendor's format, and loads back to the same weights and logits."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import checkpoint_folder, decoding
from support.checkpoint_folder import DESCRIPTION, Copy

from jax_kvcache import checkpoints
from jax_kvcache.model.linear import StaticInt8Linear


def load(folder, quantize=None):
    return checkpoints.load(folder, quantize, progress=False)


def assert_same(model, other):
    """The same parts with the same weights, to the bit."""
    assert jax.tree.structure(model.layers) == jax.tree.structure(other.layers)
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    for field in dataclasses.fields(model.config):
        if field.name != "rope":
            assert getattr(model.config, field.name) == getattr(other.config, field.name)
    ropes = (m.config.rope.frequencies(m.config.head_dim, 9) for m in (model, other))
    np.testing.assert_array_equal(*(np.append(f, factor) for f, factor in ropes))


@pytest.mark.parametrize("name", checkpoint_folder.NAMES)
def test_load_save_load(name, tmp_path):
    model = load(checkpoint_folder.FOLDERS / name)
    checkpoints.save(model, tmp_path / "saved")
    assert_same(load(tmp_path / "saved"), model)


def test_the_demo(tmp_path):
    model = checkpoints.load_demo()
    checkpoints.save(model, tmp_path / "saved")
    assert_same(load(tmp_path / "saved"), model)


def test_from_float_to_w8a8_with_an_int8_cache(tmp_path):
    model = load(checkpoint_folder.FOLDERS / "llama3_float", "w8a8")
    scale = jnp.full((2, 2, 32), 0.05)
    model = dataclasses.replace(model, cache_params={"scale_k": scale, "scale_v": scale})
    checkpoints.save(model, tmp_path / "saved")
    description = json.loads((tmp_path / "saved" / DESCRIPTION).read_text())
    assert description["model_quant_type"] == "W8A8_DYNAMIC"
    assert description["model.layers.0.self_attn.k_proj.weight_offset"] == "W8A8_DYNAMIC"
    assert description["model.layers.1.self_attn.v_proj.kv_cache_scale"] == "C8"
    assert description["lm_head.weight"] == "FLOAT"
    ids = checkpoint_folder.expected("llama3_float")["ids"]
    logits, cache = decoding.at_once(load(tmp_path / "saved"), ids)
    expected, wanted = decoding.at_once(model, ids)
    np.testing.assert_array_equal(logits, expected)
    np.testing.assert_array_equal(cache.k_cache, wanted.k_cache)


@pytest.mark.parametrize("family", ["llama3", "qwen2", "mistral"])
@pytest.mark.parametrize("static", [(0, "qkv"), (0, "o"), (1, "qkv"), (1, "o"), (0, "down")])
def test_layers_of_different_kinds(family, static, tmp_path):
    """Some layers of static activations, whose integer bias is not one of the model's."""
    (index, part) = static
    base, other = (
        load(checkpoint_folder.FOLDERS / f"{family}_ascendv1_{kind}")
        for kind in ("dynamic", "static")
    )
    layers = list(base.layers)
    changed = {part: getattr(other.layers[index], part)}
    layers[index] = dataclasses.replace(layers[index], **changed)
    model = dataclasses.replace(base, layers=tuple(layers))
    checkpoints.save(model, tmp_path / "saved")
    assert_same(load(tmp_path / "saved"), model)


def test_deq_scale_is_that_of_a_bfloat16_model(tmp_path):
    for kind, dtype in (("static", "bfloat16"), ("dynamic", "float32")):
        checkpoints.save(
            load(checkpoint_folder.FOLDERS / f"llama3_ascendv1_{kind}"), tmp_path / kind
        )
        assert json.loads((tmp_path / kind / "config.json").read_text())["dtype"] == dtype
    name = "model.layers.0.self_attn.q_proj.deq_scale"
    assert checkpoint_folder.read_tensors(tmp_path / "static")[name].dtype == np.float32


def test_partial_rotary(tmp_path):
    """Columns that were permuted on loading go back to the order of the file."""
    copy = Copy("qwen3_float")
    copy.config["rope_parameters"]["partial_rotary_factor"] = 0.5
    model = load(copy.write(tmp_path / "folder"))
    checkpoints.save(model, tmp_path / "saved")
    assert_same(load(tmp_path / "saved"), model)
    tensors = checkpoint_folder.read_tensors(tmp_path / "saved")
    for name, array in copy.tensors.items():
        np.testing.assert_array_equal(tensors[name], array)


def test_refuses(tmp_path):
    model = load(checkpoint_folder.FOLDERS / "mistral_ascendv1_static")
    with pytest.raises(ValueError, match=r"must be a new or an empty folder, and '.*' holds files"):
        checkpoints.save(model, checkpoint_folder.FOLDERS / "mistral_float")
    (linear,) = model.layers[0].qkv
    assert isinstance(linear, StaticInt8Linear)
    floats = dataclasses.replace(linear, bias=linear.bias.astype(jnp.float32))
    layer = dataclasses.replace(model.layers[0], qkv=(floats,))
    model = dataclasses.replace(model, layers=(layer, *model.layers[1:]))
    with pytest.raises(ValueError, match=r"`model.layers.0.self_attn.q_proj` has static activati"):
        checkpoints.save(model, tmp_path / "saved")


@pytest.mark.parametrize("biases", [False, True])
def test_biases_are_in_the_config(biases, tmp_path):
    """Readers that make a model from config.json alone have a place for every bias, and no more."""
    copy = Copy("llama3_float")
    copy.config |= {"attention_bias": biases, "mlp_bias": biases}
    names = [name for name in copy.tensors if name.endswith("_proj.weight")] if biases else []
    for name in names:
        width = len(copy.tensors[name])
        copy.put(name.replace(".weight", ".bias"), np.linspace(-1, 1, width, dtype=np.float32))
    model = load(copy.write(tmp_path / "folder"))
    checkpoints.save(model, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["attention_bias"] is config["mlp_bias"] is biases
    assert_same(load(tmp_path / "saved"), model)
