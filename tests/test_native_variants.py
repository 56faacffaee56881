"""Every instruction set of the native kernel, on one thread and on two, bit for bit."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import golden_calls
import jax
import native_calls
import numpy as np
import oracle
import pytest
import random_calls

from jax_kvcache import _ffi, dequant_rope_quant_kvcache

GOLDEN = [name for name in golden_calls.NAMES if name != golden_calls.REFUSED]
NUM_FORMS, DRAWS_PER_FORM = 12, 4
# 2.7 MB to move in contiguous mode, 1.4 MB in page mode: enough for two threads.
LARGE = {
    "contiguous": random_calls.Form(
        320, 1, 8, 1, 128, 320, 4, np.int32, random_calls.BF16, "contiguous", True, True, True,
        random_calls.BF16,
    ),
    "page": random_calls.Form(
        100, 3, 6, 2, 96, 4, 80, np.float16, np.float16, "page", True, True, False, None
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _restore_simd():
    yield
    native_calls.LIBRARY.jax_kvcache_use_simd(native_calls.SIMD[-1].encode())


def check_every_variant(function, inputs, expected, where):
    for simd in native_calls.SIMD:
        assert native_calls.LIBRARY.jax_kvcache_use_simd(simd.encode())
        assert _ffi.simd() == simd
        for name, got, want in zip(golden_calls.RESULTS, function(**inputs), expected, strict=True):
            if want is not None:
                oracle.assert_same_bits(got, want, f"{where}, {simd}: {name}")


def operator(**options):
    return jax.jit(functools.partial(dequant_rope_quant_kvcache, **options, implementation="ffi"))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    golden = golden_calls.load(name)
    expected = [golden.expected[key] for key in golden_calls.RESULTS]
    check_every_variant(operator(**golden.options), golden.inputs, expected, name)


@pytest.mark.parametrize("seed", range(1000, 1000 + NUM_FORMS))
def test_random(seed):
    rng = np.random.default_rng(seed)
    form = random_calls.draw_form(rng)
    function = operator(**form.options)
    for _ in range(DRAWS_PER_FORM):
        inputs = random_calls.draw_inputs(rng, form)
        expected = oracle.dequant_rope_quant_kvcache(**inputs, **form.options)
        check_every_variant(function, inputs, expected, str(form))


def check_large():
    for mode, form in LARGE.items():
        inputs = random_calls.draw_inputs(np.random.default_rng(1), form)
        expected = oracle.dequant_rope_quant_kvcache(**inputs, **form.options)
        check_every_variant(operator(**form.options), inputs, expected, mode)


def test_split_over_threads():
    """As many threads as this process has CPUs; CI has two."""
    assert _ffi.worth_threads(1_400_000) == min(2, native_calls.THREADS) or native_calls.THREADS > 2
    check_large()


def test_results_in_huge_pages():
    """A q of 34 MB, for which the handler asks for huge pages, and a k and v below that."""
    form = random_calls.Form(
        1, 4096, 32, 1, 128, 1, 4096, np.float16, np.float16, "page", True, True, False, None
    )  # fmt: skip
    inputs = random_calls.draw_inputs(np.random.default_rng(3), form)
    reference = functools.partial(dequant_rope_quant_kvcache, **form.options, implementation="xla")
    for got, want in zip(
        operator(**form.options)(**inputs), jax.jit(reference)(**inputs), strict=True
    ):
        oracle.assert_same_bits(np.asarray(got), np.asarray(want), "huge pages")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity here")
def test_on_one_cpu():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import test_native_variants as t; assert t._ffi.worth_threads(1 << 30) == 1\n"
        "t.check_large(); print('same bits')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert "same bits" in run.stdout, run.stderr


@pytest.mark.parametrize("simd", native_calls.SIMD)
def test_duplicate_rows_are_never_torn(simd):
    """Two threads, every token to one of two rows: each row is one token's, the last."""
    native_calls.LIBRARY.jax_kvcache_use_simd(simd.encode())
    form = LARGE["page"]
    rng = np.random.default_rng(2)
    inputs = random_calls.draw_inputs(rng, form)
    T = form.B * form.S
    inputs["indices"] = rng.integers(7, 9, T).astype(np.int32)
    result = operator(**form.options)(**inputs)
    for row in (7, 8):
        last = int(np.flatnonzero(inputs["indices"] == row)[-1])
        alone = {**inputs, "indices": np.where(np.arange(T) == last, row, -1).astype(np.int32)}
        expected = oracle.dequant_rope_quant_kvcache(**alone, **form.options)
        for got, want in ((result.k_cache, expected[3]), (result.v_cache, expected[4])):
            got, want = (np.asarray(c).reshape(-1, form.Nkv, form.D)[row] for c in (got, want))
            np.testing.assert_array_equal(got, want)
