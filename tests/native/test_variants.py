"""Every instruction set of the native kernel, on one thread and on two, bit for bit."""

import os

import numpy as np
import pytest
from support import cases, golden_calls, native_calls, oracle, process, random_calls, variants
from support.internals import library
from support.results import assert_results

NUM_FORMS, DRAWS_PER_FORM = 12, 4


@pytest.fixture(autouse=True)
def _restore_simd():
    yield
    variants.use(native_calls.SIMD[-1])


@pytest.mark.parametrize("name", golden_calls.ACCEPTED)
def test_golden(name):
    variants.check_every_variant(cases.golden(name))


@pytest.mark.parametrize("seed", range(1000, 1000 + NUM_FORMS))
def test_random(seed):
    variants.check_every_variant(cases.random(seed, DRAWS_PER_FORM))


def test_split_over_threads():
    """As many threads as this process has CPUs; CI has two."""
    assert (
        library.worth_threads(1_400_000) == min(2, native_calls.THREADS) or native_calls.THREADS > 2
    )
    variants.check_large()


def test_results_in_huge_pages():
    """A q of 34 MB, for which the handler asks for huge pages, and a k and v below that."""
    form = random_calls.Form(
        1, 4096, 32, 1, 128, 1, 4096, np.float16, np.float16, "page", True, True, False, None
    )  # fmt: skip
    inputs = random_calls.draw_inputs(np.random.default_rng(3), form)
    native, reference = (cases.jitted(form.options, name)(**inputs) for name in ("ffi", "xla"))
    assert_results(native, reference, "huge pages")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity here")
def test_on_one_cpu():
    assert process.run(process.PROGRAMS / "one_cpu.py") == "same bits\n"


@pytest.mark.parametrize("simd", native_calls.SIMD)
def test_duplicate_rows_are_never_torn(simd):
    """Two threads, every token to one of two rows: each row is one token's, the last."""
    variants.use(simd)
    form = variants.LARGE["page"]
    rng = np.random.default_rng(2)
    inputs = random_calls.draw_inputs(rng, form)
    T = form.B * form.S
    inputs["indices"] = rng.integers(7, 9, T).astype(np.int32)
    result = cases.jitted(form.options, "ffi")(**inputs)
    for row in (7, 8):
        last = int(np.flatnonzero(inputs["indices"] == row)[-1])
        alone = {**inputs, "indices": np.where(np.arange(T) == last, row, -1).astype(np.int32)}
        expected = oracle.dequant_rope_quant_kvcache(**alone, **form.options)
        for got, want in ((result.k_cache, expected[3]), (result.v_cache, expected[4])):
            got, want = (np.asarray(c).reshape(-1, form.Nkv, form.D)[row] for c in (got, want))
            np.testing.assert_array_equal(got, want)
