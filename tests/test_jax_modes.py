"""Every public function under JAX's modes: the same dtypes and the same values."""

import ast
import functools
import inspect
from pathlib import Path

import jax
import numpy as np
import pytest
from support import host_calls, public_calls
from support.modes import MODES

import jax_kvcache
from jax_kvcache import KVCache, PagedKVCache, checkpoints, model, numerics
from jax_kvcache.numerics import ErrorObserver

CALLS = public_calls.calls()
HOST_CALLS = host_calls.calls()
MORE = {
    "debug_nans": lambda: jax.debug_nans(True),
    "transfer_guard": lambda: jax.transfer_guard("disallow"),
    "checking_leaks": jax.checking_leaks,
}


# What has no call in `public_calls` or `host_calls`, and why.
ELSEWHERE = {
    "local_slots": "runs inside jax.shard_map, tests/mesh",
    "forward": "the model has tests of its own, tests/model",
    "forward_float": "as forward",
    "new_cache": "as forward",
    "new_paged_cache": "as forward",
}


@functools.cache
def expected(name):
    return HOST_CALLS[name]() if name in HOST_CALLS else CALLS[name](public_calls.arrays())


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


@pytest.mark.parametrize("name", HOST_CALLS)
@pytest.mark.parametrize("mode", [*MODES, *MORE])
def test_mode_on_the_host(mode, name):
    expected(name)
    with (MODES | MORE)[mode]():
        got = jax.block_until_ready(HOST_CALLS[name]())
    check(name, got)


def test_every_public_function_has_a_call():
    called = set()
    for module in (public_calls, host_calls):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            called |= {getattr(node, "attr", None), getattr(node, "id", None)}
    public = {
        name
        for module in (jax_kvcache, checkpoints, model, numerics)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__.startswith("jax_kvcache.")
    }
    methods = {
        name
        for owner in (KVCache, PagedKVCache, numerics.MinMax, numerics.Sketch, ErrorObserver)
        for name, value in inspect.getmembers(owner, inspect.isroutine)
        if not name.startswith("_")
    }
    assert len(public) > 20
    assert set(ELSEWHERE) <= public
    assert not (public | methods) - called - set(ELSEWHERE)
