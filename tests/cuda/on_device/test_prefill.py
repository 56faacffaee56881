"""Prefill on a GPU: cuDNN over codes in float16, as exact as attention over a bfloat16 cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import attention
from support.attention import BF16, Call

from jax_kvcache import decode_attention

pytestmark = pytest.mark.cuda_device

CALLS = {
    "consecutive": Call(B=2, S=64, D=64, rows=300, dtype=BF16),
    "odd sizes": Call(B=3, S=37, Nq=6, Nkv=3, D=80, rows=333, dtype=BF16, offset=9.0),
    "paged": Call(kind="paged", B=2, S=130, D=128, rows=2100, block=16, dtype=BF16, sinks=True),
    "missing blocks": Call(
        kind="paged", B=2, S=40, D=64, rows=500, block=8, dtype=BF16, holes=True
    ),
    "window": Call(B=2, S=200, D=64, rows=900, window=150, dtype=BF16),
    "layers": Call(B=1, S=20, D=64, rows=150, layers=2, dtype=BF16),
    "soft cap": Call(B=1, S=64, D=64, rows=150, soft_cap=5.0, dtype=BF16),
    "float32": Call(B=1, S=64, D=64, rows=150),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("consecutive", [True, False])
def test_prefill(name, consecutive):
    """Positions that follow each other, as in a prompt, and positions of any order."""
    call = CALLS[name]
    q, cache, keywords = call.draw()
    if consecutive:
        first = np.array([call.rows - call.S, 0, 5][: call.B], np.int32)
        keywords["positions"] = first[:, None] + np.arange(call.S, dtype=np.int32)
    run = jax.jit(lambda q, cache: decode_attention(q, cache, return_lse=True, **keywords))
    out, lse = run(q, cache)
    expected, expected_lse, _, value = attention.in_float64(q, cache, **keywords)
    # The largest values are 2.56 or a little more. Rounding such a result to bfloat16 changes it by
    # 2**-7 at most, 0.78 * 2**-8 of 2.56. What is rounded to float16 adds a few hundredths.
    eps = 2.0**-8 if call.dtype == BF16 else 2.0**-18
    error = np.abs(np.asarray(out, np.float64) - expected).max() / value
    assert error <= eps, error
    seen = np.isfinite(expected_lse)
    np.testing.assert_array_equal(np.asarray(lse) == -np.inf, ~seen)
    assert np.abs(np.asarray(lse)[seen] - expected_lse[seen]).max() <= 4 * eps
    assert not np.asarray(out, np.float32)[~seen].any()


def test_a_loop_of_long_rows():
    """More rows than are dequantised together."""
    q, cache, keywords = Call(B=4, S=32, Nq=8, Nkv=8, D=128, rows=40_000, dtype=BF16).draw()
    keywords["positions"] = np.arange(39_968, 40_000, dtype=np.int32) * np.ones((4, 1), np.int32)
    keywords["positions"][1] -= 20_000
    out = decode_attention(q, cache, **keywords)
    exact = decode_attention(q.astype(jnp.float32), cache, **keywords)
    assert np.abs(np.asarray(out, np.float32) - np.asarray(exact)).max() <= 2.0**-8 * 2.56
