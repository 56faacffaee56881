"""Every instruction set of the native kernel: the same bits from each."""

import numpy as np
from support import cases, native_calls
from support.internals import library
from support.native_calls import SIMD
from support.random_calls import BF16, Form

# 2.7 MB to move in contiguous mode, 1.4 MB in page mode: enough for two threads.
LARGE = {
    "contiguous": Form(
        320, 1, 8, 1, 128, 320, 4, np.int32, BF16, "contiguous", True, True, True, BF16
    ),
    "page": Form(
        100, 3, 6, 2, 96, 4, 80, np.float16, np.float16, "page", True, True, False, None
    ),
}  # fmt: skip


def use(simd):
    assert native_calls.LIBRARY.jax_kvcache_use_simd(simd.encode())
    assert library.simd() == simd


def check_every_variant(case):
    """Every call of a case, on each instruction set in turn."""
    function = case.function("ffi")
    for arrays, check in case.calls():
        for simd in SIMD:
            use(simd)
            try:
                check(function(**arrays))
            except AssertionError as error:
                error.add_note(f"on the instruction set {simd}")
                raise


def check_large():
    for form in LARGE.values():
        check_every_variant(cases.of_form(form, seed=1, draws=1))
