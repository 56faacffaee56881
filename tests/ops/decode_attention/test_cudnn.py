"""The prefill that calls cuDNN, with XLA in cuDNN's place: rows seen, merging, and the error.

tests/cuda/on_device/test_prefill.py calls cuDNN itself.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import attention
from support.attention import BF16, CALLS, Call
from support.internals import attention_api, attention_reference, compat, cudnn

PROMPTS = {
    "prompt of several tiles": Call(B=3, S=70, rows=200),
    "short rows": Call(B=2, S=40, rows=30),
    "window": Call(B=2, S=50, rows=300, window=40),
    "window, paged": Call(kind="paged", B=2, S=50, rows=300, window=70, holes=True),
    "missing blocks": Call(kind="paged", B=3, S=33, rows=400, holes=True, sinks=True, layers=2),
}
TAKEN = {
    name: call
    for name, call in (CALLS | PROMPTS).items()
    if call.dtype == np.float32 and not call.soft_cap and call.rows <= 3000
}


def in_xla(q, k, v, *, scale, mask=None, kv_lengths=None, causal=False):
    """What `_compat.cudnn_attention` computes; a query that sees nothing gets any numbers.

    As in cuDNN, the weights and the results are rounded to q's dtype, all else is float32, and a
    mask is a number that is added to the scores.
    """
    dtype = q.dtype
    assert k.dtype == v.dtype == dtype
    unseen = -(2.0**15) if dtype == jnp.float16 else -(2.0**41)
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2).astype(jnp.float32) for a in (k, v))
    scores = jnp.einsum("bsnd,bcnd->bsnc", q.astype(jnp.float32), k, precision="highest") * scale
    if mask is not None:
        assert mask.shape == (q.shape[0], 1, q.shape[1], k.shape[1])
        scores = scores + jnp.where(mask.transpose(0, 2, 1, 3), 0.0, unseen)
    if kv_lengths is not None:
        seen = jnp.arange(k.shape[1]) < kv_lengths[:, None]
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    if causal:
        assert kv_lengths is not None
        seen = np.arange(k.shape[1]) <= np.arange(q.shape[1])[:, None]
        scores = jnp.where(seen[:, None], scores, -jnp.inf)
    peak = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = weights.sum(axis=-1)
    weights = weights.astype(dtype).astype(jnp.float32)
    out = jnp.einsum("bsnc,bcnd->bsnd", weights, v, precision="highest") / total[..., None]
    return out.astype(dtype), peak[..., 0] + jnp.log(total)


def canonical(q, cache, keywords):
    """The primitive's operands and options."""
    given = {"q": q, "cache": cache, "return_lse": True} | keywords
    fields = dict.fromkeys(attention_api.Call._fields) | given
    return attention_api.canonical_operands(attention_api.Call(**fields))[:2]


@pytest.fixture
def in_place_of_cudnn(monkeypatch):
    monkeypatch.setattr(cudnn, "refusal", lambda operands, options: None)
    monkeypatch.setattr(compat, "cudnn_attention", in_xla)


@pytest.fixture
def in_float32(in_place_of_cudnn, monkeypatch):
    """What is not cuDNN's rounding must be as exact as the operator promises."""
    monkeypatch.setattr(cudnn, "_DTYPE", jnp.float32)


def attend(operands, options):
    run = attention_reference.decode_attention_reference
    return jax.jit(functools.partial(run, options=options, platform="cuda"))(operands)


def check(call, consecutive):
    q, cache, keywords = call.draw()
    if consecutive:
        first = np.array([max(call.rows - call.S, 0), 0, 5][: call.B], np.int32)
        keywords["positions"] = first[:, None] + np.arange(call.S, dtype=np.int32)
    operands, options = canonical(q, cache, keywords)
    out, lse = attend(operands, options)
    expected, expected_lse, score, value = attention.in_float64(q, cache, **keywords)
    attention.assert_close(out, expected, value, score)
    seen = np.isfinite(expected_lse)
    np.testing.assert_array_equal(np.asarray(lse) == -np.inf, ~seen)
    np.testing.assert_allclose(np.asarray(lse)[seen], expected_lse[seen], rtol=1e-5, atol=1e-5)
    assert not np.asarray(out)[~seen].any()


@pytest.mark.parametrize("consecutive", [False, True])
@pytest.mark.parametrize("name", PROMPTS)
def test_equals_float64(name, consecutive, in_float32):
    check(PROMPTS[name], consecutive)


def read_in_small_pieces(monkeypatch):
    for number, size in (("_MULTIPLE", 8), ("_MASKED_ROWS", 16), ("_BUDGET", 1)):
        monkeypatch.setattr(cudnn, number, size)


@pytest.mark.parametrize("name", TAKEN)
def test_equals_float64_in_small_pieces(name, in_float32, monkeypatch):
    read_in_small_pieces(monkeypatch)
    check(TAKEN[name], consecutive=name in PROMPTS)


@pytest.mark.parametrize("shared", ["k_cache", "v_cache"])
def test_one_cache_of_all_examples(shared, in_float32):
    """As vmap leaves what it does not map: with a group dimension of 1."""
    calls = [PROMPTS["short rows"].draw(seed) for seed in range(3)]
    one = getattr(calls[0][1], shared)
    caches = [dataclasses.replace(cache, **{shared: one}) for _, cache, _ in calls]
    examples = [
        canonical(q, cache, keywords) for (q, _, keywords), cache in zip(calls, caches, strict=True)
    ]
    stacked = jax.tree.map(
        lambda *a: a[0] if a[0].size == 0 else jnp.stack(a), *[e[0] for e in examples]
    )
    stacked = stacked._replace(**{shared: getattr(stacked, shared)[:1]})
    out, _ = attend(stacked, examples[0][1])
    for i, (q, _, keywords) in enumerate(calls):
        expected, _, score, value = attention.in_float64(q, caches[i], **keywords)
        attention.assert_close(out[i], expected, value, score)


@pytest.mark.parametrize("window", [None, 40])
def test_the_last_position_of_int32(window, in_float32):
    """Nothing can be added to it."""
    call = PROMPTS["prompt of several tiles"]._replace(window=window)
    q, cache, keywords = call.draw()
    keywords["positions"] = np.full((call.B, call.S), 2**31 - 1, np.int32)
    keywords["positions"][0, :5] = 3
    out, _ = attend(*canonical(q, cache, keywords))
    expected, _, score, value = attention.in_float64(q, cache, **keywords)
    attention.assert_close(out, expected, value, score)


def test_rows_past_int32(in_float32):
    """A block table may name nearly 2**31 rows; no row after the last one is another one again."""
    call = Call(kind="paged", B=2, S=17, rows=1024, block=1024, Nq=1, Nkv=1, D=8)
    q, cache, keywords = call.draw()
    table = np.tile(keywords["block_table"][:, :1], (1, 2**21))
    step = np.arange(17, dtype=np.int32)
    keywords["positions"] = np.stack([5 + step, np.where(step % 2, 2900, 0)]).astype(np.int32)
    operands, options = canonical(q, cache, keywords | {"block_table": table})
    out, lse = attend(operands, options)
    few = keywords | {"block_table": table[:, :4]}  # all that is seen
    expected, expected_lse, score, value = attention.in_float64(q, cache, **few)
    attention.assert_close(out, expected, value, score)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 7])
def test_no_sequences(window, in_float32):
    q, cache, keywords = Call(kind="paged", B=2, S=20, rows=40, window=window).draw()
    keywords |= {name: keywords[name][:0] for name in ("positions", "block_table")}
    out, lse = attend(*canonical(q[:0], cache, keywords))
    assert out.shape == (0, *q.shape[1:])
    assert lse.shape == (0, *q.shape[1:3])


LENGTHS = {
    "prompt of several tiles": Call(B=3, S=70, rows=200),
    "longer than the cache": Call(B=3, S=70, rows=30),
    "window": Call(B=3, S=50, rows=300, window=40),
    "layers": Call(B=3, S=50, rows=300, layers=2),
    "paged": Call(kind="paged", B=3, S=33, rows=400),
    "missing blocks": Call(kind="paged", B=3, S=33, rows=400, holes=True),
    "offsets and sinks": Call(B=3, S=70, rows=200, offset=9.0, sinks=True),
}


@pytest.mark.parametrize("pieces", ["large pieces", "small pieces"])
@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_equal_positions(name, pieces, in_float32, monkeypatch):
    """Also where a sequence has fewer rows than queries, or more than the cache."""
    if pieces == "small pieces":
        read_in_small_pieces(monkeypatch)
    call = LENGTHS[name]
    q, cache, keywords = call.draw()
    lengths = np.array([call.rows, 7, call.rows + 25], np.int32)
    keywords["positions"] = lengths[:, None] + np.arange(-call.S, 0, dtype=np.int32)
    expected, expected_lse, score, value = attention.in_float64(q, cache, **keywords)
    out, lse = attend(*canonical(q, cache, keywords | {"positions": None, "lengths": lengths}))
    attention.assert_close(out, expected, value, score)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pieces", ["large pieces", "small pieces"])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_padded_prompts(kind, pieces, in_float32, monkeypatch):
    """Queries that are consecutive but for padding around them, or within, or in no sequence."""
    if pieces == "small pieces":
        read_in_small_pieces(monkeypatch)
    call = Call(kind=kind, B=6, S=40, rows=100)
    q, cache, keywords = call.draw()
    step = np.arange(40, dtype=np.int32)
    keywords["positions"] = np.stack([
        np.where(step < 7, step, -1),
        np.where(step < 33, -1, step - 33),
        np.where((step < 5) | (step > 30), -5, step + 20),
        np.where(step % 3 == 0, -1, step + 50),
        np.full(40, -(2**31), np.int32),
        np.where(step < 20, step + 85, step - 20),
    ])  # fmt: skip
    expected, expected_lse, score, value = attention.in_float64(q, cache, **keywords)
    out, lse = attend(*canonical(q, cache, keywords))
    attention.assert_close(out, expected, value, score)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "window", "loops"),
    [("lengths", None, 0), ("positions", None, 1), ("lengths", 700, 1), ("positions", 700, 1)],
)
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("budget", [256 << 20, 1 << 18])
def test_loops_of_unknown_length(
    given, window, loops, kind, budget, in_place_of_cudnn, monkeypatch
):
    """The host would wait for their conditions. A prompt given by its length has none.

    But for rows that may be missing, and more rows than are read together.
    """
    monkeypatch.setattr(cudnn, "_BUDGET", budget)
    if not window:
        loops = max(loops, kind == "paged") + (budget < 256 << 20)
    q, cache, keywords = Call(kind=kind, B=2, S=64, rows=3000, dtype=BF16, window=window).draw()
    del keywords["positions"]
    keywords[given] = np.full((2,) if given == "lengths" else (2, 64), 2000, np.int32)
    operands, options = canonical(q, cache, keywords)
    run = functools.partial(
        attention_reference.decode_attention_reference, options=options, platform="cuda"
    )
    assert str(jax.make_jaxpr(run)(operands)).count(" while[") == loops


def count_calls(monkeypatch, q, cache, keywords):
    """How often one call of the operator calls cuDNN."""
    done = []

    def count(q, k, v, **keywords):
        jax.debug.callback(done.append, 0)
        return in_xla(q, k, v, **keywords)

    monkeypatch.setattr(compat, "cudnn_attention", count)
    jax.block_until_ready(attend(*canonical(q, cache, keywords)))
    jax.effects_barrier()
    return len(done)


@pytest.mark.parametrize(
    ("given", "steps", "calls"),
    [("lengths", 24, 2), ("positions", 24, 2), ("no order", 8, 3), ("no order", 100, 6)],
)
def test_calls_of_cudnn(given, steps, calls, in_place_of_cudnn, monkeypatch):
    """All rows together, the causal call, and where it reads nothing 8 under a mask at a time."""
    for number, size in (("_MULTIPLE", 8), ("_MASKED_ROWS", 8), ("_SAMPLE", 8)):
        monkeypatch.setattr(cudnn, number, size)
    q, cache, keywords = Call(B=1, S=steps, rows=30, dtype=BF16).draw()
    del keywords["positions"]
    if given == "lengths":
        keywords["lengths"] = np.array([30], np.int32)
    else:
        positions = np.arange(30 - steps, 30, dtype=np.int32)
        keywords["positions"] = (positions[::-1] if given == "no order" else positions)[None]
    assert count_calls(monkeypatch, q, cache, keywords) == calls


@pytest.mark.parametrize(("window", "calls"), [(5, 1), (200, 1), (900, 2), (4096, 2)])
def test_calls_under_a_window(window, calls, in_place_of_cudnn, monkeypatch):
    """Each reads what the window and the queries span, 512 rows at most."""
    monkeypatch.setattr(cudnn, "_MASKED_ROWS", 512)
    q, cache, keywords = Call(B=1, S=20, rows=1000, window=window, dtype=BF16).draw()
    keywords["positions"] = np.arange(980, 1000, dtype=np.int32)[None]
    assert count_calls(monkeypatch, q, cache, keywords) == calls


PROMPT = Call(B=1, S=96, D=64, rows=1100, q_size=0.2, spread=8.0, dtype=BF16)
INEXACT = {
    "mean of V near zero": PROMPT,
    "codes of one sign": PROMPT._replace(spread=1.0),
    "offsets": PROMPT._replace(offset=100.0),
    "few rows count": PROMPT._replace(q_size=1.0, offset=9.0),
    "all rows count alike": PROMPT._replace(q_size=0.001),
    "the whole prompt": PROMPT._replace(rows=96),
}


@pytest.mark.parametrize("given", ["positions", "lengths"])
@pytest.mark.parametrize("pieces", ["large pieces", "small pieces"])
@pytest.mark.parametrize("name", INEXACT)
def test_no_worse_than_one_call_over_bfloat16(name, pieces, given, in_place_of_cudnn, monkeypatch):
    """The largest and the mean error are at most those of cuDNN over a bfloat16 cache."""
    if pieces == "small pieces":
        monkeypatch.setattr(cudnn, "_BUDGET", 1)
    call = INEXACT[name]
    for seed in range(4):
        q, cache, keywords = call.draw(seed)
        if name == "codes of one sign":
            cache = dataclasses.replace(cache, v_cache=cache.v_cache // 8 + 90)
        keywords["positions"] = np.arange(call.rows - call.S, call.rows, dtype=np.int32)[None]
        by_length = {"positions": None, "lengths": np.array([call.rows], np.int32)}
        ours, lse = attend(
            *canonical(q, cache, keywords | (by_length if given == "lengths" else {}))
        )
        k, v = (a.astype(BF16) for a in cache.dequantize())
        mask = (np.arange(call.rows) <= keywords["positions"][..., None])[:, None]
        theirs, their_lse = in_xla(q, k, v, scale=call.D**-0.5, mask=mask)
        assert ours.dtype == theirs.dtype == jnp.bfloat16
        expected, expected_lse, _, _ = attention.in_float64(q, cache, **keywords)
        ours, theirs = (np.abs(np.asarray(a, np.float64) - expected) for a in (ours, theirs))
        assert ours.max() <= theirs.max()
        assert (ours**2).mean() <= (theirs**2).mean()
        lse, their_lse = (np.abs(np.asarray(a) - expected_lse).max() for a in (lse, their_lse))
        assert lse <= their_lse + 1e-5


def test_what_is_not_finite_stays_in_its_query(in_place_of_cudnn):
    q, cache, keywords = PROMPT.draw()
    keywords["positions"] = np.arange(1004, 1100, dtype=np.int32)[None]
    expected, _ = attend(*canonical(q, cache, keywords))
    for bad in (np.nan, np.inf, -np.inf):
        out, lse = attend(*canonical(q.at[0, 7, 1, 3].set(bad), cache, keywords))
        assert np.isnan(np.asarray(out, np.float32)[0, 7, 1]).all()
        assert np.isnan(lse[0, 7, 1])
        np.testing.assert_array_equal(out.at[0, 7, 1].set(0), expected.at[0, 7, 1].set(0))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_query_that_sees_nothing_may_hold_anything(bad, in_place_of_cudnn):
    q, cache, keywords = PROMPT._replace(offset=9.0, sinks=True).draw()
    step = np.arange(96, dtype=np.int32)[None]
    keywords["positions"] = np.where(step < 5, -1, step)
    expected, expected_lse = attend(*canonical(q, cache, keywords))
    out, lse = attend(*canonical(q.at[0, 2].set(bad), cache, keywords))
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)
    assert not np.asarray(out, np.float32)[0, :5].any()
    assert (np.asarray(lse)[0, :5] == -np.inf).all()


REFUSED = {
    "cuDNN is for S >= 17 queries per sequence, got S = 16": Call(S=16, D=64, dtype=BF16),
    "cuDNN is for q in bfloat16, got float32": Call(S=17, D=64),
    "cuDNN is for D <= 128 and a multiple of 8, got D = 192": Call(S=17, D=192, dtype=BF16),
    "cuDNN is for D <= 128 and a multiple of 8, got D = 68": Call(S=17, D=68, dtype=BF16),
    "cuDNN has no soft cap": Call(S=17, D=64, soft_cap=3.0, dtype=BF16),
    "this process has no NVIDIA GPU": Call(S=17, D=64, dtype=BF16),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason):
    q, cache, keywords = REFUSED[reason].draw()
    operands, options = canonical(q, cache, keywords)
    assert cudnn.refusal(operands, options) == reason


def test_refusals_on_a_gpu(monkeypatch):
    monkeypatch.setattr(cudnn.cuda, "is_here", lambda: True)
    operands, options = canonical(*Call(S=17, D=64, dtype=BF16).draw())
    reason = None if compat.has_cudnn() else "JAX was built without cuDNN"
    assert cudnn.refusal(operands, options) == reason
    [rows] = jax.export.symbolic_shape("rows")
    unknown = jax.ShapeDtypeStruct((2, rows, 2, 64), jnp.int8)
    assert cudnn.refusal(operands._replace(k_cache=unknown), options) == "the shapes are not known"
