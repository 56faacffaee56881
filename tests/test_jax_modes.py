"""Every public function under JAX's modes: the same dtypes and the same values."""

import functools

import jax
import numpy as np
import pytest
from support import public_calls
from support.modes import MODES

CALLS = public_calls.calls()
MORE = {
    "debug_nans": lambda: jax.debug_nans(True),
    "transfer_guard": lambda: jax.transfer_guard("disallow"),
    "checking_leaks": jax.checking_leaks,
}


@functools.cache
def expected(name):
    return CALLS[name](public_calls.arrays())


def check(name, got):
    for actual, want in zip(jax.tree.leaves(got), jax.tree.leaves(expected(name)), strict=True):
        if isinstance(want, str):
            assert actual == want
            continue
        assert actual.dtype == want.dtype
        actual, want = (np.asarray(a).astype(np.float64) for a in (actual, want))
        np.testing.assert_allclose(actual, want, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", [*MODES, *MORE])
def test_mode(mode, name):
    expected(name)  # made outside the mode
    call, arrays = CALLS[name], public_calls.arrays()
    if mode == "transfer_guard" and not name.startswith("explain"):
        # Outside a compiled program JAX's own jnp.zeros is a transfer, and so are constants of one
        # that is being made.
        call = jax.jit(call).lower(arrays).compile()
    with (MODES | MORE)[mode]():
        got = jax.block_until_ready(call(arrays))
    check(name, got)
