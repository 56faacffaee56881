"""The XLA reference and the native CPU kernel pass the operator's conformance suite."""

import functools

import jax
import pytest
from support import cases, conformance, golden_calls

from jax_kvcache import dequant_rope_quant_kvcache


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("name", conformance.CASES)
def test_case(name, implementation):
    for make in conformance.CASES[name]:
        assert make().run(implementation) > 0


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("name", golden_calls.ACCEPTED)
def test_golden_eagerly(name, implementation):
    cases.golden(name)._replace(transform=lambda operator: operator).run(implementation)


@pytest.mark.parametrize("name", golden_calls.ACCEPTED[::6])
def test_golden_on_constants(name):
    [(arrays, check)] = cases.golden(name).calls()
    operator = functools.partial(dequant_rope_quant_kvcache, **golden_calls.load(name).options)
    check(jax.jit(functools.partial(operator, **arrays))())


def test_a_lone_offset_is_refused():
    call = golden_calls.load(golden_calls.REFUSED)
    with pytest.raises(ValueError, match="`offset_k` without `offset_v`"):
        dequant_rope_quant_kvcache(**call.inputs, **call.options)
