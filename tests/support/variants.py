"""Every instruction set of the native kernel: the same bits from each."""

import functools

import jax
import numpy as np
from support import golden_calls, native_calls, oracle, random_calls

from jax_kvcache import _ffi, dequant_rope_quant_kvcache

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


def check_every_variant(function, inputs, expected, where):
    for simd in native_calls.SIMD:
        assert native_calls.LIBRARY.jax_kvcache_use_simd(simd.encode())
        assert _ffi.simd() == simd
        for name, got, want in zip(golden_calls.RESULTS, function(**inputs), expected, strict=True):
            if want is not None:
                oracle.assert_same_bits(got, want, f"{where}, {simd}: {name}")


def operator(**options):
    return jax.jit(functools.partial(dequant_rope_quant_kvcache, **options, implementation="ffi"))


def check_large():
    for mode, form in LARGE.items():
        inputs = random_calls.draw_inputs(np.random.default_rng(1), form)
        expected = oracle.dequant_rope_quant_kvcache(**inputs, **form.options)
        check_every_variant(operator(**form.options), inputs, expected, mode)
