"""The oracle that the conformance suite compares with, and what the suite's calls cover."""

import numpy as np
import pytest
from support import conformance, golden_calls, oracle, random_calls
from support.results import assert_results


def test_there_are_25_golden_calls():
    assert len(golden_calls.NAMES) == 25


@pytest.mark.parametrize("name", golden_calls.ACCEPTED)
def test_golden(name):
    call = golden_calls.load(name)
    options = {k: call.options[k] for k in ("cache_mode", "kv_output")}
    assert_results(oracle.dequant_rope_quant_kvcache(**call.inputs, **options), call.expected, name)


EDGES = [name for name in conformance.CASES if name.startswith(("edges", "skipped_nan"))]


@pytest.mark.parametrize("name", EDGES)
def test_a_row_that_no_token_names_stays_as_it_was(name):
    [make] = conformance.CASES[name]
    cache_mode = make().options["cache_mode"]
    calls = list(make().calls())
    for call, _ in calls:
        results = oracle.dequant_rope_quant_kvcache(**call, cache_mode=cache_mode)
        rows = oracle.rows_of_tokens(
            call["indices"], call["x"].shape, call["k_cache"].shape, cache_mode
        )
        untouched = np.ones(call["k_cache"].shape[:2], bool)
        for row in rows:
            if row is not None:
                untouched[row] = False
        assert untouched.any()
        for after, before in zip(results[3:], (call["k_cache"], call["v_cache"]), strict=True):
            np.testing.assert_array_equal(after[untouched], before[untouched])
        if name.startswith("skipped_nan"):
            assert untouched.all()
            assert np.isnan(results[0]).all()


def test_random_forms_cover_the_options():
    forms = [
        random_calls.draw_form(np.random.default_rng(seed)) for seed in range(conformance.NUM_FORMS)
    ]
    assert {f.bias_dtype for f in forms} >= {None, np.int32, np.float16, np.float32}
    assert {f.S for f in forms} == {None, 1, 2, 3}
    assert {(np.dtype(f.x_dtype), np.dtype(f.dtype)) for f in forms} >= {
        (np.dtype(x), np.dtype(d)) for d in random_calls.FLOATS for x in (np.int32, d)
    }
    assert {(f.cache_mode, f.kv_output, f.offsets) for f in forms} >= {
        (m, k, o) for m in ("contiguous", "page") for k in (False, True) for o in (False, True)
    }
    assert any(f.C1 > f.B for f in forms if f.cache_mode == "contiguous")
