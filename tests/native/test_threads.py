"""Several Python threads call one compiled step at once, each with its own donated caches."""

import concurrent.futures
import functools

import jax
import numpy as np
import pytest
from support import golden_calls, oracle, random_calls

from jax_kvcache import dequant_rope_quant_kvcache

THREADS, CALLS = 8, 25


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
def test_eight_threads(implementation):
    form = random_calls.draw_form(np.random.default_rng(3))
    step = jax.jit(
        functools.partial(
            dequant_rope_quant_kvcache, **form.options, implementation=implementation
        ),
        donate_argnames=("k_cache", "v_cache"),
    )

    def work(seed):
        inputs = random_calls.draw_inputs(np.random.default_rng(seed), form)
        expected = oracle.dequant_rope_quant_kvcache(**inputs, **form.options)
        for _ in range(CALLS):
            result = step(**inputs | {k: jax.device_put(inputs[k]) for k in ("k_cache", "v_cache")})
            for name, a, b in zip(golden_calls.RESULTS, result, expected, strict=True):
                if b is not None:
                    oracle.assert_same_bits(a, b, f"thread {seed}: {name}")
        return CALLS

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        assert sum(pool.map(work, range(THREADS))) == THREADS * CALLS
