"""The write's conformance suite: the cases that every implementation of it has to pass.

`CASES` is the one list of them: the XLA reference and the native CPU kernel run it in
tests/ops/dequant_rope_quant_kvcache/test_conformance.py, an NVIDIA GPU in
tests/cuda/on_device/test_write.py, an Ascend device what it takes of it in
tests/ascend/on_device/test_conformance.py.
"""

import functools
import itertools

import numpy as np
from support import calls, cases, golden_calls, oracle, random_calls, vmap_calls
from support.cases import Case, against_oracle
from support.random_calls import BF16
from support.results import assert_same_bits

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
NUM_FORMS, DRAWS_PER_FORM = 64, 16  # 1,024 random calls
NUM_COMBINATIONS = 20  # of vmap, for each mode
B, C2 = 3, 6  # of the calls below


def call_with(indices, *, C1, S, cache_mode):
    """A float16 call with these indices, in a cache of C1 times 6 rows of random codes."""
    rng = np.random.default_rng(0)
    call = calls.arguments(
        B=B, S=S, D=32, Nkv=2, C1=C1, C2=C2, x_dtype=np.float16, cache_mode=cache_mode,
        make=lambda shape, dtype: rng.uniform(0.5, 1, shape).astype(dtype),
    )  # fmt: skip
    for name in ("k_cache", "v_cache"):
        call[name] = rng.integers(-128, 128, call[name].shape, np.int8)
    return call | {"indices": np.asarray(indices, np.int32).reshape(call["indices"].shape)}


# Indices


def contiguous_edges(C1, S):
    edges = (-1, -2, INT32_MIN, 0, C2 - 1, C2, C2 + 5, C1 * C2, INT32_MAX, C2 - S, C2 - 2)
    for first, last in itertools.product(edges, (0, -1, C2 - 1)):
        yield [first, 2, last]


def page_edges(C1, S):
    edges = (-1, -2, INT32_MIN, 0, C2 - 1, C2, C2 + 5, C1 * C2 - 1, C1 * C2, INT32_MAX)
    for edge, position in itertools.product(edges, (0, B * S - 1)):
        slots = [1, 2, 3, 7, 8, 9, 13, 14, 15][: B * S]
        slots[position] = edge
        yield slots


def edges(cache_mode, C1, S) -> Case:
    """Every index that is special, at the first and at the last place."""
    lists = contiguous_edges if cache_mode == "contiguous" else page_edges

    def draw():
        for indices in lists(C1, S):
            yield str(indices), call_with(indices, C1=C1, S=S, cache_mode=cache_mode)

    return against_oracle({"cache_mode": cache_mode}, draw)


def skipped_nan(cache_mode) -> Case:
    """A NaN token that is skipped changes nothing, and q is NaN."""

    def draw():
        call = call_with([-1] * B, C1=B, S=1, cache_mode=cache_mode)
        yield "NaN", call | {"x": np.full_like(call["x"], np.nan)}

    return against_oracle({"cache_mode": cache_mode}, draw)


def promised() -> Case:
    """Good indices give the same when they are promised to be good."""

    def draw():
        yield "promised", call_with([0, 3, 5], C1=B, S=1, cache_mode="contiguous")

    return against_oracle({"indices_mode": "promise_in_bounds"}, draw)


def duplicates() -> Case:
    """Tokens that share a row: the row is one of theirs, K and V each, and no other row changes."""
    slots = [4, 4, 4, 9, 9, 4, -1, 9, 4]
    call = call_with(slots, C1=B, S=3, cache_mode="page")
    empty = np.zeros_like(call["k_cache"])
    apart = {"indices": np.arange(9, dtype=np.int32), "k_cache": empty, "v_cache": empty}

    def check(result):
        alone = oracle.dequant_rope_quant_kvcache(**call | apart, cache_mode="page")
        for name, codes in (("k_cache", alone[3]), ("v_cache", alone[4])):
            after = np.asarray(getattr(result, name)).reshape(-1, 2, 32)
            before = call[name].reshape(-1, 2, 32)
            rows = codes.reshape(-1, 2, 32)[:9]
            for slot in (4, 9):
                candidates = rows[[t for t in range(9) if slots[t] == slot]]
                assert any((after[slot] == row).all() for row in candidates), name
            others = [r for r in range(after.shape[0]) if r not in (4, 9)]
            np.testing.assert_array_equal(after[others], before[others])

    return Case({"cache_mode": "page"}, lambda: iter([(call, check)]))


# Numbers


def subnormals(dtype) -> Case:
    """float32 and bfloat16 subnormals may be flushed, so only the other rows are compared."""
    call = call_with([2, -1, 5], C1=B, S=1, cache_mode="contiguous")
    tiny = np.asarray(1e-39, dtype)
    assert tiny != 0
    for name in ("x", "cos", "sin"):
        call[name] = np.full(call[name].shape, tiny, dtype)
    call["scale_k"] = np.full_like(call["scale_k"], 1e-40)

    def check(result):
        for name in ("k_cache", "v_cache"):
            after, before = np.asarray(getattr(result, name)).copy(), call[name].copy()
            after[0, 2] = before[0, 2] = after[2, 5] = before[2, 5] = 0
            assert_same_bits(after, before, name)

    return Case({}, lambda: iter([(call, check)]))


def of_dtypes(x_dtype, dtype, bias_dtype) -> Case:
    """Two random calls with everything given that goes with these dtypes."""
    accumulator = x_dtype is np.int32
    form = random_calls.Form(
        2, 2, 2, 2, 32, 2, 5, x_dtype, dtype, "contiguous", True, True, accumulator, bias_dtype
    )  # fmt: skip
    return cases.of_form(form, seed=0, draws=2)


DTYPES = [  # of x, of the tables, of bias
    *((dtype, dtype, None) for dtype in random_calls.FLOATS),
    *itertools.product([np.int32], random_calls.FLOATS, [None, *random_calls.FLOATS, np.int32]),
]


def named():
    """(name, what makes the cases of that name): one, or many that share compiled shapes."""
    make = functools.partial
    for name in golden_calls.ACCEPTED:
        yield f"golden-{name}", [make(cases.golden, name)]
    for seed in range(NUM_FORMS):
        yield f"random-{seed}", [make(cases.random, seed, DRAWS_PER_FORM)]
    for dtypes in DTYPES:
        names = (np.dtype(d).name if d else "none" for d in dtypes)
        yield "dtypes-x_{}-cos_{}-bias_{}".format(*names), [make(of_dtypes, *dtypes)]
    for cache_mode, C1, S in itertools.product(("contiguous", "page"), (B, B + 2), (1, 3)):
        yield f"edges-{cache_mode}-C1_{C1}-S_{S}", [make(edges, cache_mode, C1, S)]
    for cache_mode in ("contiguous", "page"):
        yield f"skipped_nan-{cache_mode}", [make(skipped_nan, cache_mode)]
    yield "promised", [promised]
    yield "duplicates", [duplicates]
    for dtype in (np.float32, BF16):
        yield f"subnormals-{np.dtype(dtype).name}", [make(subnormals, dtype)]
    for mode, optionals in itertools.product(vmap_calls.MODES, vmap_calls.OPTIONALS):
        combination = make(vmap_calls.combination, mode=mode, optionals=optionals)
        seeds = range(NUM_COMBINATIONS)
        yield f"vmap-{mode}-{optionals}", [make(combination, seed) for seed in seeds]


CASES = dict(named())
