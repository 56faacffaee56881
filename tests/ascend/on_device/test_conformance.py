"""The golden calls and random ones through the operator; what it refuses, through XLA, visibly."""

import functools
import warnings

import jax
import numpy as np
import pytest
from support import golden_calls, oracle, random_calls

from jax_kvcache import dequant_rope_quant_kvcache, explain

NUM_FORMS, DRAWS_PER_FORM = 30, 10  # 300 calls
NUM_REFUSED = 6


def jitted(options, implementation):
    return jax.jit(
        functools.partial(dequant_rope_quant_kvcache, **options, implementation=implementation)
    )


def check(result, expected, where):
    for name, actual, wanted in zip(golden_calls.RESULTS, result, expected, strict=True):
        if wanted is None:
            assert actual is None
        else:
            oracle.assert_same_bits(actual, wanted, f"{where}: {name}")


def explain_form(form, **options):
    inputs = random_calls.draw_inputs(np.random.default_rng(0), form)
    return inputs, explain(**inputs, **form.options, **options)


@functools.cache
def forms():
    """Random forms that the operator takes, and some that it refuses."""
    taken, refused = [], []
    seed = 0
    while len(taken) < NUM_FORMS:
        form = random_calls.draw_form(np.random.default_rng(seed))
        seed += 1
        runs = explain_form(form)[1].implementation
        (taken if runs == "ffi" else refused).append((seed, form))
    return taken, refused[:NUM_REFUSED]


@pytest.mark.ascend_device
@pytest.mark.parametrize("name", [n for n in golden_calls.NAMES if n != golden_calls.REFUSED])
def test_golden(name, launches):
    call = golden_calls.load(name)
    result = jitted(call.options, "ffi")(**call.inputs)
    check(result, [call.expected[key] for key in golden_calls.RESULTS], name)
    assert launches() in (1, None)


@pytest.mark.ascend_device
@pytest.mark.parametrize("number", range(NUM_FORMS))
def test_random(number, launches):
    seed, form = forms()[0][number]
    function = jitted(form.options, "ffi")
    rng = np.random.default_rng(seed)
    for draw in range(DRAWS_PER_FORM):
        inputs = random_calls.draw_inputs(rng, form)
        expected = oracle.dequant_rope_quant_kvcache(**inputs, **form.options)
        check(function(**inputs), expected, f"{form}, draw {draw}")
    assert launches() in (DRAWS_PER_FORM, None)


@pytest.mark.parametrize("number", range(NUM_REFUSED))
def test_refused(number, standin):
    _, form = forms()[1][number]
    inputs, explanation = explain_form(form)
    assert explanation.implementation == "xla"
    with pytest.warns(UserWarning, match="runs its XLA implementation on (ascend|ASCEND): the "):
        result = jitted(form.options, None)(**inputs)
    check(result, oracle.dequant_rope_quant_kvcache(**inputs, **form.options), str(form))
    assert standin.launches == 0
    with pytest.raises(NotImplementedError, match='`implementation="ffi"`: the '):
        jitted(form.options, "ffi")(**inputs)


def test_the_operator_is_the_default(standin):
    _, form = forms()[0][0]
    inputs = random_calls.draw_inputs(np.random.default_rng(0), form)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.block_until_ready(jitted(form.options, None)(**inputs))
    assert standin.launches == 1
