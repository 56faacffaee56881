"""The prefill that calls cuDNN, with XLA in cuDNN's place: which rows each query sees, and merging.

tests/cuda/on_device/test_prefill.py calls cuDNN itself.
"""

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


def in_xla(q, k, v, *, scale, mask=None, kv_lengths=None):
    """What `_compat.cudnn_attention` computes; a query that sees nothing gets any numbers."""
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    scores = jnp.einsum("bsnd,bcnd->bsnc", q, k, precision="highest") * scale
    if mask is not None:
        assert mask.shape == (q.shape[0], 1, q.shape[1], k.shape[1])
        scores = jnp.where(mask.transpose(0, 2, 1, 3), scores, -1e30)
    if kv_lengths is not None:
        seen = jnp.arange(k.shape[1]) < kv_lengths[:, None]
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("bsnc,bcnd->bsnd", weights, v, precision="highest")
    return out, jax.nn.logsumexp(scores, axis=-1)


def canonical(q, cache, keywords):
    """The primitive's operands and options."""
    given = {"q": q, "cache": cache, "return_lse": True} | keywords
    fields = dict.fromkeys(attention_api.Call._fields) | given
    return attention_api.canonical_operands(attention_api.Call(**fields))[:2]


@pytest.fixture
def in_place_of_cudnn(monkeypatch):
    monkeypatch.setattr(cudnn, "refusal", lambda operands, options: None)
    monkeypatch.setattr(compat, "cudnn_attention", in_xla)


def check(call, consecutive):
    q, cache, keywords = call.draw()
    if consecutive:
        first = np.array([max(call.rows - call.S, 0), 0, 5][: call.B], np.int32)
        keywords["positions"] = first[:, None] + np.arange(call.S, dtype=np.int32)
    operands, options = canonical(q, cache, keywords)
    run = attention_reference.decode_attention_reference
    out, lse = jax.jit(functools.partial(run, options=options, platform="cuda"))(operands)
    expected, expected_lse, score, value = attention.in_float64(q, cache, **keywords)
    attention.assert_close(out, expected, value, score)
    seen = np.isfinite(expected_lse)
    np.testing.assert_array_equal(np.asarray(lse) == -np.inf, ~seen)
    np.testing.assert_allclose(np.asarray(lse)[seen], expected_lse[seen], rtol=1e-5, atol=1e-5)
    assert not np.asarray(out)[~seen].any()


@pytest.mark.parametrize("consecutive", [False, True])
@pytest.mark.parametrize("name", PROMPTS)
def test_equals_float64(name, consecutive, in_place_of_cudnn):
    check(PROMPTS[name], consecutive)


@pytest.mark.parametrize("name", TAKEN)
def test_equals_float64_in_small_pieces(name, in_place_of_cudnn, monkeypatch):
    for number, size in (("_MULTIPLE", 8), ("_MASKED_ROWS", 16), ("_BUDGET", 1)):
        monkeypatch.setattr(cudnn, number, size)
    check(TAKEN[name], consecutive=name in PROMPTS)


REFUSED = {
    "cuDNN is for S >= 17 queries per sequence, got S = 16": Call(S=16, D=64, dtype=BF16),
    "cuDNN would compute in bfloat16, and q is float32": Call(S=17, D=64),
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
