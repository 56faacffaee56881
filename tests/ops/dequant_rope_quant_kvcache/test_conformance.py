"""The golden calls, bit for bit: the oracle, and the operator eagerly and under jit."""

import functools

import jax
import pytest
from support import golden_calls, oracle

from jax_kvcache import dequant_rope_quant_kvcache

ACCEPTED = [name for name in golden_calls.NAMES if name != golden_calls.REFUSED]


def check(result, expected, name):
    for key, actual in zip(golden_calls.RESULTS, result, strict=True):
        if expected[key] is None:
            assert actual is None
        else:
            oracle.assert_same_bits(actual, expected[key], f"{name}: {key}")


def test_there_are_25_calls():
    assert len(golden_calls.NAMES) == 25


@pytest.mark.parametrize("name", ACCEPTED)
def test_oracle(name):
    call = golden_calls.load(name)
    options = {k: call.options[k] for k in ("cache_mode", "kv_output")}
    check(oracle.dequant_rope_quant_kvcache(**call.inputs, **options), call.expected, name)


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", ACCEPTED)
def test_operator(name, jit, implementation):
    call = golden_calls.load(name)
    function = functools.partial(
        dequant_rope_quant_kvcache, **call.options, implementation=implementation
    )
    function = jax.jit(function) if jit else function
    check(function(**call.inputs), call.expected, name)


@pytest.mark.parametrize("name", ACCEPTED[::6])
def test_operator_on_constants(name):
    call = golden_calls.load(name)
    function = functools.partial(dequant_rope_quant_kvcache, **call.inputs, **call.options)
    check(jax.jit(function)(), call.expected, name)


def test_lone_offset_is_refused():
    call = golden_calls.load(golden_calls.REFUSED)
    with pytest.raises(ValueError, match="`offset_k` without `offset_v`"):
        dequant_rope_quant_kvcache(**call.inputs, **call.options)
