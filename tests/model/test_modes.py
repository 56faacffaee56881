"""A decoder gives the same under JAX's modes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import checkpoint_folder
from support.modes import MODES

from jax_kvcache import checkpoints
from jax_kvcache.model import forward, forward_float, new_cache

FOLDERS = ("qwen3_ascendv1_dynamic", "qwen2_ascendv1_static", "mistral_float")
TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)


def run(model, tokens):
    """A chunk of two texts, one more token, and the texts without a cache."""
    step = jax.jit(forward)
    cache, start = new_cache(model, 2, 8), jnp.zeros(2, jnp.int32)
    first, cache = step(model, tokens[:, :5], cache, start)
    second, cache = step(model, tokens[:, 5:], cache, start + jnp.int32(5))
    return first, second, jax.jit(forward_float)(model, tokens).logits


@functools.cache
def loaded(name):
    model = checkpoints.load(checkpoint_folder.FOLDERS / name, progress=False)
    return model, run(model, jnp.asarray(TOKENS))


@pytest.mark.parametrize("mode", ["x64", "strict_promotion", "rank_promotion_raises"])
@pytest.mark.parametrize("name", FOLDERS)
def test_mode(name, mode):
    model, expected = loaded(name)
    with MODES[mode]():
        if mode != "x64":  # a checkpoint has no 64-bit floats; loading is the same code
            checkpoints.load(checkpoint_folder.FOLDERS / name, progress=False)
        got = run(model, jnp.asarray(TOKENS))
    for logits, right in zip(got, expected, strict=True):
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, right, atol=2e-2 * np.abs(right).max())
