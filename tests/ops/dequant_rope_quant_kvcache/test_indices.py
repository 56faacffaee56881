"""Any index is safe: a row that a call does not name stays byte for byte as it was."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import calls, oracle

from jax_kvcache import dequant_rope_quant_kvcache

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
B, C2 = 3, 6


@functools.cache
def compiled(cache_mode, implementation):
    return jax.jit(
        functools.partial(
            dequant_rope_quant_kvcache, cache_mode=cache_mode, implementation=implementation
        )
    )


def call_with(indices, *, C1, S, cache_mode):
    rng = np.random.default_rng(0)
    call = calls.arguments(
        B=B, S=S, D=32, Nkv=2, C1=C1, C2=C2, x_dtype=np.float16, cache_mode=cache_mode,
        make=lambda shape, dtype: rng.uniform(0.5, 1, shape).astype(dtype),
    )  # fmt: skip
    for name in ("k_cache", "v_cache"):
        call[name] = rng.integers(-128, 128, call[name].shape, np.int8)
    return call | {"indices": np.asarray(indices, np.int32).reshape(call["indices"].shape)}


def check(indices, implementation, **sizes):
    call = call_with(indices, **sizes)
    cache_mode = sizes["cache_mode"]
    result = compiled(cache_mode, implementation)(**call)
    expected = oracle.dequant_rope_quant_kvcache(**call, cache_mode=cache_mode)
    for name, i in (("q", 0), ("k_cache", 3), ("v_cache", 4)):
        oracle.assert_same_bits(getattr(result, name), expected[i], f"{name} for {indices}")
    named = oracle.rows_of_tokens(indices, call["x"].shape, call["k_cache"].shape, cache_mode)
    untouched = np.ones(call["k_cache"].shape[:2], bool)
    for row in named:
        if row is not None:
            untouched[row] = False
    for name in ("k_cache", "v_cache"):
        after = np.asarray(getattr(result, name))
        np.testing.assert_array_equal(after[untouched], call[name][untouched])


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("C1", [B, B + 2])
@pytest.mark.parametrize("S", [1, 3])
def test_contiguous(S, C1, implementation):
    edges = (-1, -2, INT32_MIN, 0, C2 - 1, C2, C2 + 5, C1 * C2, INT32_MAX, C2 - S, C2 - 2)
    for first, last in itertools.product(edges, (0, -1, C2 - 1)):
        check([first, 2, last], implementation, C1=C1, S=S, cache_mode="contiguous")


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("C1", [B, B + 2])
@pytest.mark.parametrize("S", [1, 3])
def test_page(S, C1, implementation):
    edges = (-1, -2, INT32_MIN, 0, C2 - 1, C2, C2 + 5, C1 * C2 - 1, C1 * C2, INT32_MAX)
    for edge, position in itertools.product(edges, (0, B * S - 1)):
        slots = [1, 2, 3, 7, 8, 9, 13, 14, 15][: B * S]
        slots[position] = edge
        check(slots, implementation, C1=C1, S=S, cache_mode="page")


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("cache_mode", ["contiguous", "page"])
def test_a_nan_token_that_is_skipped_changes_nothing(cache_mode, implementation):
    call = call_with([-1] * B, C1=B, S=1, cache_mode=cache_mode)
    call["x"] = np.full_like(call["x"], np.nan)
    result = compiled(cache_mode, implementation)(**call)
    np.testing.assert_array_equal(result.k_cache, call["k_cache"])
    np.testing.assert_array_equal(result.v_cache, call["v_cache"])
    assert np.isnan(np.asarray(result.q)).all()


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
def test_duplicate_rows_are_not_torn(implementation):
    """Tokens that share a row: the row is one of theirs, K and V each, and no other row changes."""
    slots = [4, 4, 4, 9, 9, 4, -1, 9, 4]
    call = call_with(slots, C1=B, S=3, cache_mode="page")
    result = compiled("page", implementation)(**call)
    empty = np.zeros_like(call["k_cache"])
    apart = {"indices": np.arange(9, dtype=np.int32), "k_cache": empty, "v_cache": empty}
    alone = oracle.dequant_rope_quant_kvcache(**call | apart, cache_mode="page")
    for name, codes in (("k_cache", alone[3]), ("v_cache", alone[4])):
        after = np.asarray(getattr(result, name)).reshape(-1, 2, 32)
        before = call[name].reshape(-1, 2, 32)
        rows = codes.reshape(-1, 2, 32)[:9]
        for slot in (4, 9):
            candidates = rows[[t for t in range(9) if slots[t] == slot]]
            assert any((after[slot] == row).all() for row in candidates)
        others = [r for r in range(after.shape[0]) if r not in (4, 9)]
        np.testing.assert_array_equal(after[others], before[others])


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
def test_promise_in_bounds_gives_the_same_for_good_indices(implementation):
    call = call_with([0, 3, 5], C1=B, S=1, cache_mode="contiguous")
    expected = oracle.dequant_rope_quant_kvcache(**call)
    result = dequant_rope_quant_kvcache(
        **call, indices_mode="promise_in_bounds", implementation=implementation
    )
    oracle.assert_same_bits(result.k_cache, expected[3])
    oracle.assert_same_bits(result.v_cache, expected[4])


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_subnormals_touch_no_other_row(dtype, implementation):
    """float32 and bfloat16 subnormals may be flushed, so only the other rows are compared."""
    call = call_with([2, -1, 5], C1=B, S=1, cache_mode="contiguous")
    tiny = np.asarray(1e-39, dtype)
    assert tiny != 0
    for name in ("x", "cos", "sin"):
        call[name] = np.full(call[name].shape, tiny, dtype)
    call["scale_k"] = np.full_like(call["scale_k"], 1e-40)
    result = compiled("contiguous", implementation)(**call)
    for name in ("k_cache", "v_cache"):
        after, before = np.asarray(getattr(result, name)).copy(), call[name].copy()
        after[0, 2] = before[0, 2] = after[2, 5] = before[2, 5] = 0
        np.testing.assert_array_equal(after, before)
