"""Every instruction set of the native kernel, on one thread and on two, bit for bit."""

import functools
import os

import jax
import numpy as np
import pytest
from support import golden_calls, native_calls, oracle, process, random_calls, variants

from jax_kvcache import _ffi, dequant_rope_quant_kvcache

GOLDEN = [name for name in golden_calls.NAMES if name != golden_calls.REFUSED]
NUM_FORMS, DRAWS_PER_FORM = 12, 4


@pytest.fixture(autouse=True)
def _restore_simd():
    yield
    native_calls.LIBRARY.jax_kvcache_use_simd(native_calls.SIMD[-1].encode())


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    golden = golden_calls.load(name)
    expected = [golden.expected[key] for key in golden_calls.RESULTS]
    variants.check_every_variant(variants.operator(**golden.options), golden.inputs, expected, name)


@pytest.mark.parametrize("seed", range(1000, 1000 + NUM_FORMS))
def test_random(seed):
    rng = np.random.default_rng(seed)
    form = random_calls.draw_form(rng)
    function = variants.operator(**form.options)
    for _ in range(DRAWS_PER_FORM):
        inputs = random_calls.draw_inputs(rng, form)
        expected = oracle.dequant_rope_quant_kvcache(**inputs, **form.options)
        variants.check_every_variant(function, inputs, expected, str(form))


def test_split_over_threads():
    """As many threads as this process has CPUs; CI has two."""
    assert _ffi.worth_threads(1_400_000) == min(2, native_calls.THREADS) or native_calls.THREADS > 2
    variants.check_large()


def test_results_in_huge_pages():
    """A q of 34 MB, for which the handler asks for huge pages, and a k and v below that."""
    form = random_calls.Form(
        1, 4096, 32, 1, 128, 1, 4096, np.float16, np.float16, "page", True, True, False, None
    )  # fmt: skip
    inputs = random_calls.draw_inputs(np.random.default_rng(3), form)
    reference = functools.partial(dequant_rope_quant_kvcache, **form.options, implementation="xla")
    for got, want in zip(
        variants.operator(**form.options)(**inputs), jax.jit(reference)(**inputs), strict=True
    ):
        oracle.assert_same_bits(np.asarray(got), np.asarray(want), "huge pages")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity here")
def test_on_one_cpu():
    assert process.run(process.PROGRAMS / "one_cpu.py") == "same bits\n"


@pytest.mark.parametrize("simd", native_calls.SIMD)
def test_duplicate_rows_are_never_torn(simd):
    """Two threads, every token to one of two rows: each row is one token's, the last."""
    native_calls.LIBRARY.jax_kvcache_use_simd(simd.encode())
    form = variants.LARGE["page"]
    rng = np.random.default_rng(2)
    inputs = random_calls.draw_inputs(rng, form)
    T = form.B * form.S
    inputs["indices"] = rng.integers(7, 9, T).astype(np.int32)
    result = variants.operator(**form.options)(**inputs)
    for row in (7, 8):
        last = int(np.flatnonzero(inputs["indices"] == row)[-1])
        alone = {**inputs, "indices": np.where(np.arange(T) == last, row, -1).astype(np.int32)}
        expected = oracle.dequant_rope_quant_kvcache(**alone, **form.options)
        for got, want in ((result.k_cache, expected[3]), (result.v_cache, expected[4])):
            got, want = (np.asarray(c).reshape(-1, form.Nkv, form.D)[row] for c in (got, want))
            np.testing.assert_array_equal(got, want)
