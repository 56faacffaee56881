"""Scales from a first prompt: the codes, what they cost, what later tokens lose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_kvcache import KVCache, checkpoints
from jax_kvcache.model import forward, forward_float

B, S, Nkv, D = 2, 7, 2, 8
RNG = np.random.default_rng(0)


def values(layers=None):
    shape = (B, S, Nkv, D) if layers is None else (layers, B, S, Nkv, D)
    return (jnp.asarray(RNG.normal(size=shape).astype(np.float32)) for _ in "kv")


@pytest.mark.parametrize("layers", [None, 3])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_holds_the_prompt(layers, wrap):
    k, v = values(layers)
    cache, cost = wrap(lambda k, v: KVCache.calibrated(k, v, 10))(k, v)
    assert cache.layers == layers
    assert cache.k_cache.shape == (*k.shape[:-3], 10, Nkv, D)
    first, second = np.asarray(k)[..., : D // 2], np.asarray(k)[..., D // 2 :]
    amplitude = np.sqrt(first**2 + second**2).max((-4, -3))
    amplitude = np.concatenate([amplitude, amplitude], -1)
    for array, codes, scale, largest in (
        (k, cache.k_cache, cache.scale_k, amplitude),
        (v, cache.v_cache, cache.scale_v, np.abs(v).max((-4, -3))),
    ):
        largest = np.maximum(largest, largest.mean(-1, keepdims=True) / 2)
        np.testing.assert_allclose(scale, 2 * largest / 127, rtol=1e-6)
        steps = np.asarray(scale)[..., None, None, :, :]
        expected = np.rint(np.asarray(array) / steps)
        np.testing.assert_array_equal(codes[..., :S, :, :], expected)
        assert not codes[..., S:, :, :].any()
    assert np.shape(cost.clipped_k) == (() if layers is None else (layers,))
    assert not np.any(cost.clipped_k)
    restored = np.asarray(cache.dequantize()[1])[..., :S, :, :]
    noise = ((restored - np.asarray(v)) ** 2).sum((-4, -3, -2, -1))
    power = (np.asarray(v) ** 2).sum((-4, -3, -2, -1))
    np.testing.assert_allclose(cost.error_v, np.sqrt(noise / power), rtol=1e-3)


def test_a_small_margin_clips_and_says_so():
    k, v = values()
    cache, cost = KVCache.calibrated(k, v, S, margin=0.5)
    clipped = np.abs(np.asarray(v)) > 127.5 * np.asarray(cache.scale_v)
    assert cost.clipped_v == pytest.approx(clipped.mean())
    assert cost.clipped_v > 0
    assert cost.error_v > KVCache.calibrated(k, v, S)[1].error_v


def test_padding_is_left_out():
    k, v = values()
    lengths = jnp.array([3, 7], jnp.int32)
    loud = k.at[0, 3:].set(100.0), v.at[0, 3:].set(jnp.nan)
    cache, cost = KVCache.calibrated(*loud, S, lengths=lengths)
    quiet = k.at[0, 3:].set(0), v.at[0, 3:].set(0)
    expected, _ = KVCache.calibrated(*quiet, S)
    for name in ("scale_k", "scale_v", "k_cache", "v_cache"):
        np.testing.assert_array_equal(getattr(cache, name), getattr(expected, name))
    assert np.isfinite(cost).all()


def test_a_prompt_of_zeros():
    zeros = jnp.zeros((1, 2, Nkv, D))
    cache, cost = KVCache.calibrated(zeros, zeros, 4)
    assert (cache.scale_k == 1).all()
    assert not np.any(cost)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_have_a_cost(number):
    """In layer 1 alone: some of K's, all of V's."""
    k, v = values(3)
    some = (1, 0, slice(0, 3), 0, 5)
    cache, cost = KVCache.calibrated(k.at[some].set(number), v.at[1].set(number), S)
    clipped = 0 if np.isnan(number) else 3 / k[0].size
    np.testing.assert_allclose(cost.clipped_k, [0, clipped, 0], rtol=1e-6)
    np.testing.assert_array_equal(cost.clipped_v, [0, 0 if np.isnan(number) else 1, 0])
    for error in (cost.error_k, cost.error_v):
        np.testing.assert_array_equal(np.isnan(error), [False, True, False])
    assert np.isfinite(cache.scale_k).all()
    assert np.isfinite(cache.scale_v).all()
    code = 0 if np.isnan(number) else np.sign(number) * 127.5 - 0.5
    assert (cache.v_cache[1] == code).all()


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e18, 1e30])
def test_the_error_does_not_depend_on_the_size_of_values(size):
    _, v = values()
    _, cost = KVCache.calibrated(v, v * np.float32(size), S)
    _, expected = KVCache.calibrated(v, v, S)
    np.testing.assert_allclose(cost.error_v, expected.error_v, rtol=1e-2)


def test_a_k_too_large_for_its_amplitude_is_clipped():
    """RoPE's amplitude is beyond float32, so that the scales are 1."""
    k, v = values()
    _, cost = KVCache.calibrated(k * 1e30, v, S)
    assert cost.clipped_k == 1
    np.testing.assert_allclose(cost.error_k, 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((jnp.zeros((B, S, Nkv, D), jnp.int8),) * 2, {}, TypeError, "`k` must have dtype float16"),
        ((jnp.zeros((S, Nkv, D)),) * 2, {}, TypeError, "`k` must be 4-D or 5-D, got 3-D"),
        (
            (jnp.zeros((B, S, Nkv, D)), jnp.zeros((B, S, Nkv, 4))),
            {},
            ValueError,
            r"`v` must have shape \[B, S, Nkv, D\] = \[2, 7, 2, 8\], got \[2, 7, 2, 4\]",
        ),
        ((jnp.zeros((B, S, Nkv, D)),) * 2, {"margin": 0}, ValueError, "`margin` must be a numb"),
        ((jnp.zeros((B, S, Nkv, D)),) * 2, {"lengths": jnp.zeros(3, jnp.int32)}, ValueError,
         r"`lengths` must have shape \[B\] = \[2\], got \[3\]"),
        ((jnp.zeros((B, 0, Nkv, D)),) * 2, {}, ValueError,
         r"`k` must have tokens and channels, got shape \[B, S, Nkv, D\] = \[2, 0, 2, 8\]"),
        ((jnp.zeros((B, 20, Nkv, D)),) * 2, {}, ValueError, "at least the prompt's S = 20 tokens"),
    ],
)  # fmt: skip
def test_refuses(arguments, options, error, message):
    with pytest.raises(error, match=message):
        KVCache.calibrated(*arguments, 10, **options)


def test_the_demos_text():
    """Scales of a short prompt cost less than 0.5 % of the nll that calibrated scales give."""
    model = checkpoints.load_demo()
    text = (checkpoints.demo_folder().parents[1] / "rope.py").read_bytes()
    prompt, length = 32, 256
    windows = np.frombuffer(text[: 8 * length], np.uint8).reshape(8, length).astype(np.int32)
    tokens, start = jnp.asarray(windows), jnp.zeros(8, jnp.int32)

    @jax.jit
    def nll(model, cache):
        logits, _ = forward(model, tokens[:, prompt:], cache, start + prompt)
        log_p = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(log_p, tokens[:, prompt + 1 :, None], axis=2).mean()

    read = jax.jit(forward_float)(model, tokens[:, :prompt])
    cache, cost = KVCache.calibrated(read.k, read.v, length)
    own = KVCache.create(8, length, 2, 64, layers=4, **model.cache_params)
    _, own = jax.jit(forward)(model, tokens[:, :prompt], own, start)
    assert float(cost.error_k.max()) < 0.02
    assert float(nll(model, cache)) == pytest.approx(float(nll(model, own)), rel=5e-3)
