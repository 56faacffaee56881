"""Sixteen folders, four families in four forms: the logits and codes that they must give.

A code on a rounding boundary may differ by 1 and move what follows: codes 99 %, logits 2 % of the
largest; for float folders 1e-4.
"""

import functools

import numpy as np
import pytest
from support import checkpoint_folder, decoding, float_decoder

from jax_kvcache import KVCache, checkpoints
from jax_kvcache.model import FloatCache, new_cache


@functools.cache
def loaded(name):
    return checkpoints.load(checkpoint_folder.FOLDERS / name, progress=False)


def test_there_are_sixteen():
    assert len(checkpoint_folder.NAMES) == 16


@pytest.mark.parametrize("read", [decoding.at_once, decoding.token_by_token])
@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("name", checkpoint_folder.NAMES)
def test_logits_and_codes(name, implementation, read):
    model, expected = loaded(name), checkpoint_folder.expected(name)
    logits, cache = read(model, expected["ids"], implementation)
    tolerance = 1e-4 if name.endswith("float") else 0.02
    assert decoding.largest_error(logits, expected["logits"]) < tolerance
    if "ascendv1" not in name:
        assert isinstance(cache, FloatCache)
        return
    assert isinstance(cache, KVCache)
    equal = []
    for n, codes in (("k", cache.k_cache), ("v", cache.v_cache)):
        for i in range(model.config.n_layers):
            right = expected[f"codes.{n}.{i}"].astype(int)
            distance = np.abs(np.asarray(codes[i, 0]).astype(int) - right)
            equal.append((distance == 0).mean())
            if i == 0:
                assert distance.max() <= 1
                assert equal[-1] > 0.995
    assert np.mean(equal) > 0.99


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "qwen3"])
def test_the_decoder_of_the_tests_agrees(family):
    """float_decoder, which derived folders are compared with, gives transformers' own logits."""
    copy = checkpoint_folder.Copy(f"{family}_float")
    expected = checkpoint_folder.expected(f"{family}_float")
    logits = float_decoder.logits(copy.config, copy.tensors, expected["ids"])
    assert decoding.largest_error(logits, expected["logits"]) < 1e-6


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_quantised_on_loading(family):
    """Near the float model's logits; the output matrix and the embedding stay float."""
    name = f"{family}_float"
    model = checkpoints.load(checkpoint_folder.FOLDERS / name, "w8a8", progress=False)
    assert model.layers[0].down.weight.dtype == np.int8
    assert model.head.weight.dtype == np.float32
    assert isinstance(new_cache(model, 1), FloatCache)
    expected = checkpoint_folder.expected(name)
    logits, _ = decoding.at_once(model, expected["ids"])
    assert 1e-4 < decoding.largest_error(logits, expected["logits"]) < 0.2

    def nll(logits):
        shifted = logits[:-1] - logits[:-1].max(axis=1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return -log_p[np.arange(23), expected["ids"][1:]].mean()

    assert nll(logits) == pytest.approx(nll(expected["logits"]), rel=0.02)


def test_sizes():
    config = loaded("mistral_float").config
    assert (config.windows, config.end_tokens, config.context) == ((8, 8), (2,), 256)
    assert loaded("qwen2_float").config.windows == (None, None)
    assert loaded("qwen2_float").head is None
    assert loaded("qwen3_float").layers[0].q_norm.shape == (32,)
    cache = new_cache(loaded("llama3_ascendv1_static"), 3)
    assert cache.k_cache.shape == (2, 3, 256, 2, 32)
    assert cache.offset_k is None, "offsets that are all zero"
    assert new_cache(loaded("llama3_ascendv1_dynamic"), 3).offset_v is not None
