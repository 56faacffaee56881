"""Several Python threads call one compiled step at once, each with its own donated caches."""

import concurrent.futures

import jax
import numpy as np
import pytest
from support import cases, random_calls

THREADS, CALLS = 8, 25
CACHES = ("k_cache", "v_cache")


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
def test_eight_threads(implementation):
    form = random_calls.draw_form(np.random.default_rng(3))
    step = jax.jit(cases.operator(form.options, implementation), donate_argnames=CACHES)

    def work(seed):
        [(inputs, check)] = cases.of_form(form, seed, draws=1).calls()
        for _ in range(CALLS):
            check(step(**inputs | {name: jax.device_put(inputs[name]) for name in CACHES}))
        return CALLS

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        assert sum(pool.map(work, range(THREADS))) == THREADS * CALLS
