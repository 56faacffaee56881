"""Random calls against the oracle, bit for bit."""

import functools

import jax
import numpy as np
import pytest
from support import golden_calls, oracle, random_calls

from jax_kvcache import dequant_rope_quant_kvcache

NUM_FORMS, DRAWS_PER_FORM = 64, 16  # 1,024 calls


def check(function, form, seed):
    rng = np.random.default_rng(seed)
    for draw in range(DRAWS_PER_FORM):
        inputs = random_calls.draw_inputs(rng, form)
        expected = oracle.dequant_rope_quant_kvcache(**inputs, **form.options)
        for name, a, b in zip(golden_calls.RESULTS, function(**inputs), expected, strict=True):
            if b is None:
                assert a is None
            else:
                oracle.assert_same_bits(a, b, f"{form}, draw {draw}: {name}")


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("seed", range(NUM_FORMS))
def test_operator(seed, implementation):
    form = random_calls.draw_form(np.random.default_rng(seed))
    function = jax.jit(
        functools.partial(dequant_rope_quant_kvcache, **form.options, implementation=implementation)
    )
    check(function, form, seed)


def test_forms_cover_the_options():
    forms = [random_calls.draw_form(np.random.default_rng(seed)) for seed in range(NUM_FORMS)]
    assert {f.bias_dtype for f in forms} >= {None, np.int32, np.float16, np.float32}
    assert {f.S for f in forms} == {None, 1, 2, 3}
    assert {(np.dtype(f.x_dtype), np.dtype(f.dtype)) for f in forms} >= {
        (np.dtype(x), np.dtype(d)) for d in random_calls.FLOATS for x in (np.int32, d)
    }
    assert {(f.cache_mode, f.kv_output, f.offsets) for f in forms} >= {
        (m, k, o) for m in ("contiguous", "page") for k in (False, True) for o in (False, True)
    }
    assert any(f.C1 > f.B for f in forms if f.cache_mode == "contiguous")
