"""The demo model against its NumPy twin: prefill, decode, and the text it writes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import numpy_model

from jax_kvcache.checkpoints import load_demo
from jax_kvcache.model import forward, forward_float, new_cache
from jax_kvcache.model.evaluate import BATCH, cut_windows
from jax_kvcache.model.generate import generate, greedy_with_float_cache

TEXT = b'def main(argv=None):\n    """Run '


@pytest.fixture(scope="module")
def model():
    return load_demo()


def numbers(text):
    return np.frombuffer(text, np.uint8).astype(np.int32)


def as_tokens(text):
    return jnp.asarray(numbers(text))[None]


def assert_close(actual, expected):
    """A code that flips at a rounding boundary moves a logit by some hundredths."""
    np.testing.assert_allclose(actual, expected, atol=0.15)
    assert np.abs(actual - expected).mean() < 0.01
    assert (actual.argmax(axis=1) == expected.argmax(axis=1)).all()


def test_prefill_and_decode_equal_numpy(model):
    expected = numpy_model.logits(TEXT, int8_cache=True)
    step = jax.jit(forward, donate_argnums=2)
    tokens, split = as_tokens(TEXT), 24
    logits, cache = step(model, tokens[:, :split], new_cache(model, 1), jnp.zeros(1, jnp.int32))
    parts = [logits[0]]
    for i in range(split, len(TEXT)):
        logits, cache = step(model, tokens[:, i : i + 1], cache, jnp.full(1, i, jnp.int32))
        parts.append(logits[0])
    assert_close(np.concatenate(parts), expected)


def test_float_cache_equals_numpy(model):
    logits, q, k, v = jax.jit(forward_float)(model, as_tokens(TEXT))
    assert_close(np.asarray(logits[0]), numpy_model.logits(TEXT, int8_cache=False))
    assert k.shape == v.shape == (4, 1, len(TEXT), 2, 64)
    assert q.shape == (4, 1, len(TEXT), 4, 64)


def test_kv_map_stands_for_a_cache_of_another_format(model):
    """With the operator's own scales it gives what the int8 cache gives."""
    scale_k, scale_v = model.cache_params["scale_k"], model.cache_params["scale_v"]

    def through_int8(layer, k, v):
        codes = (jnp.clip(jnp.rint(a.astype(jnp.float32) / s[layer]), -128, 127) * s[layer]
                 for a, s in ((k, scale_k), (v, scale_v)))  # fmt: skip
        return tuple(codes)

    logits, _, k, _ = jax.jit(forward_float, static_argnames="kv_map")(
        model, as_tokens(TEXT), kv_map=through_int8
    )
    codes = np.asarray(k) / np.asarray(scale_k)[:, None, None]
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-3)
    expected = numpy_model.logits(TEXT, int8_cache=True)
    assert np.abs(np.asarray(logits[0]) - expected).mean() < 0.05


def test_greedy_text_is_numpys_greedy_text(model):
    steps = generate(model, new_cache(model, 1), numbers(TEXT), temperature=0.0, seed=0)
    text = bytearray(TEXT)
    for step in itertools.islice(steps, 12):
        assert step.token[0] == step.greedy[0]
        text.append(int(step.token[0]))
    expected = numpy_model.logits(bytes(text), int8_cache=True).argmax(axis=1)
    assert expected[len(TEXT) - 1 : -1].tolist() == list(text[len(TEXT) :])
    greedy = greedy_with_float_cache(model, numbers(bytes(text)), 256)
    assert greedy[len(TEXT) - 1 : -1].tolist() == list(text[len(TEXT) :])


def test_sampling_depends_on_the_seed_alone(model):
    def sample(seed):
        cache = new_cache(model, 1)
        steps = generate(model, cache, numbers(TEXT), temperature=1.0, seed=seed)
        return [int(step.token[0]) for step in itertools.islice(steps, 20)]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_the_least_temperature_is_greedy(model):
    steps = generate(model, new_cache(model, 1), numbers(TEXT), temperature=2e-38, seed=0)
    for step in itertools.islice(steps, 20):
        assert step.token[0] == step.greedy[0]


def test_generation_ends_with_the_context(model):
    prompt = numbers(TEXT * 8)
    steps = list(generate(model, new_cache(model, 1), prompt[:250], temperature=0.0, seed=0))
    assert len(steps) == 256 - 250 + 1
    steps = list(generate(model, new_cache(model, 1, 40), prompt[:38], temperature=0.0, seed=0))
    assert len(steps) == 40 - 38 + 1


def test_windows():
    windows = cut_windows([b"a" * 513, b"bcd", b"", b"e"], 256)
    assert windows.tokens.shape == (1, BATCH, 256)
    assert windows.targets[0, :4].tolist() == [255, 255, 2, 0]
    assert windows.tokens[0, 2, :4].tolist() == [98, 99, 100, 0]


SCALES = {
    f"layers.{i}.{n}": np.ones((2, 64), np.float32)
    for i in range(4)
    for n in ("scale_k", "scale_v")
}


def test_scales_from_a_file(tmp_path):
    path = tmp_path / "scales.npz"
    np.savez(path, **SCALES | {"layers.2.scale_v": np.full((2, 64), 3, np.float32)})
    params = load_demo(path).cache_params
    assert set(params) == {"scale_k", "scale_v"}
    assert params["scale_v"][2, 1, 5] == 3
    offsets = {key.replace("scale", "offset"): a for key, a in SCALES.items()}
    np.savez(path, **SCALES, **offsets)
    assert new_cache(load_demo(path), 1).offset_v.shape == (4, 2, 64)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"layers.3.scale_k": None}, "must hold 'layers.3.scale_k', and '.*' does not"),
        ({"layers.1.offset_k": SCALES["layers.0.scale_k"]}, "must hold 'layers.0.offset_k'"),
        ({"layers.1.scale_v": np.ones((2, 32), np.float32)}, r"= \[2, 64\], got float32 of .*32\]"),
        ({"layers.1.scale_v": np.ones((2, 64), np.float64)}, "got float64"),
    ],
)
def test_refuses_scales(arrays, message, tmp_path):
    path = tmp_path / "scales.npz"
    np.savez(path, **{key: a for key, a in (SCALES | arrays).items() if a is not None})
    with pytest.raises(ValueError, match=message):
        load_demo(path)


def test_refuses_files_that_hold_no_scales(tmp_path):
    path = tmp_path / "text"
    for content in (b"", b"some text", b"PK\x03\x04 no zip"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"`scales` must be an .npz file"):
            load_demo(path)
    np.save(tmp_path / "one.npy", np.ones(3))
    with pytest.raises(ValueError, match="holds one array"):
        load_demo(tmp_path / "one.npy")
