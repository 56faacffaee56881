"""The demo model decodes on the device as it does on this machine's CPU."""

import argparse
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.internals import api
from support.results import assert_results

from jax_kvcache.checkpoints import load_demo
from jax_kvcache.model import forward, new_cache
from jax_kvcache.model.evaluate import BATCH, cut_windows, nll_int8_cache
from jax_kvcache.model.generate import generate

PROMPT = np.frombuffer(b"class Parser:\n    def __init__(self", np.uint8).astype(np.int32)
TOKENS = 64
NEAR_TIE = 1e-3  # of two logits: the matmuls come from another build of XLA
NLL_TOLERANCE = 1e-3  # nats per byte, as for the matmuls


def on_cpu():
    return jax.default_device(jax.local_devices(backend="cpu")[0])


@functools.cache
def models():
    """The model on the device, and on the CPU."""
    with on_cpu():
        cpu = load_demo()
    return load_demo(), cpu


def greedy(model, tokens):
    steps = generate(model, new_cache(model, 1), PROMPT, temperature=0, seed=0)
    return [int(step.token[0]) for step in itertools.islice(steps, tokens)]


@pytest.mark.ascend_device
def test_decoding(launches):
    device, cpu = models()
    written = greedy(device, TOKENS)
    assert launches() in (TOKENS * device.config.n_layers, None)
    with on_cpu():
        expected = greedy(cpu, TOKENS)
        first = next((i for i in range(TOKENS) if written[i] != expected[i]), None)
        if first is None:
            return
        text = np.concatenate([PROMPT, np.array(expected[:first], np.int32)])
        start = jnp.zeros(1, jnp.int32)
        logits = forward(cpu, jnp.asarray(text[None]), new_cache(cpu, 1), start)[0][0, -1]
    assert abs(logits[written[first]] - logits[expected[first]]) < NEAR_TIE


@pytest.mark.ascend_device
def test_the_operator_at_every_layer(monkeypatch):
    """Records the operands and results of every layer, and asks the CPU's operator the same."""
    device, _ = models()
    operator = api.bind
    options_seen = []

    def record(model, tokens, cache):
        layers = []

        def recording(operands, options):
            results = operator(operands, options)
            layers.append((operands, results))
            options_seen.append(options)
            return results

        with monkeypatch.context() as patch:
            patch.setattr(api, "bind", recording)
            forward(model, tokens, cache, jnp.zeros(1, jnp.int32), implementation="ffi")
        return layers

    tokens = jnp.asarray(PROMPT[None])
    layers = jax.device_get(jax.jit(record)(device, tokens, new_cache(device, 1)))
    assert len(layers) == len(options_seen) == device.config.n_layers
    with on_cpu():
        for i, (operands, results) in enumerate(layers):
            expected = operator(operands, options_seen[i])
            assert_results(results, expected, f"layer {i}")


@pytest.mark.ascend_device
def test_nll(launches):
    device, cpu = models()
    text = Path(argparse.__file__).read_bytes()
    windows = cut_windows([text[: BATCH * device.config.context]], device.config.context)
    [tokens], [targets] = windows
    mean = float(nll_int8_cache(device, tokens, targets).sum() / targets.sum())
    assert launches() in (device.config.n_layers, None)
    with on_cpu():
        expected = nll_int8_cache(cpu, tokens, targets).sum() / targets.sum()
    assert abs(mean - float(expected)) < NLL_TOLERANCE
