"""Prefill on a GPU: cuDNN over codes in float16, as exact as attention over a bfloat16 cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
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


def check(results, call, q, cache, keywords):
    out, lse = results
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
    check(run(q, cache), call, q, cache, keywords)


@pytest.mark.parametrize("window", [None, 150])
def test_lengths(window):
    """A prompt given by its length, also one that is shorter than the queries."""
    call = Call(B=2, S=64, D=64, rows=300, window=window, dtype=BF16)
    q, cache, keywords = call.draw()
    lengths = np.array([300, 40], np.int32)
    del keywords["positions"]
    results = decode_attention(q, cache, lengths, return_lse=True, **keywords)
    keywords["positions"] = lengths[:, None] + np.arange(-64, 0, dtype=np.int32)
    check(results, call, q, cache, keywords)


def test_mesh_of_one_device():
    q, cache, keywords = Call(B=2, S=64, Nkv=2, D=64, rows=300, dtype=BF16).draw()
    run = jax.jit(lambda q, cache: decode_attention(q, cache, **keywords))
    alone = run(q, cache)
    mesh = jax.make_mesh((1,), ("heads",), (AxisType.Auto,))
    with jax.set_mesh(mesh):
        heads = NamedSharding(mesh, PartitionSpec(None, None, "heads"))
        q = jax.device_put(q, heads)
        k_cache, v_cache = jax.device_put((cache.k_cache, cache.v_cache), heads)
        on_mesh = run(q, dataclasses.replace(cache, k_cache=k_cache, v_cache=v_cache))
    np.testing.assert_array_equal(on_mesh, alone)


def test_no_worse_than_a_bfloat16_cache():
    """The mean error is at most that of cuDNN over a bfloat16 cache of the exact values."""
    call = Call(B=1, S=96, D=64, rows=1100, q_size=0.2, spread=8.0, dtype=BF16)
    q, cache, keywords = call.draw()
    positions = np.arange(call.rows - call.S, call.rows, dtype=np.int32)[None]
    keywords["positions"] = positions
    ours = decode_attention(q, cache, **keywords)
    k, v = (a.astype(BF16) for a in cache.dequantize())
    mask = jnp.asarray(np.arange(call.rows) <= positions[..., None])[:, None]
    theirs = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    expected, *_ = attention.in_float64(q, cache, **keywords)
    errors = [((np.asarray(out, np.float64) - expected) ** 2).mean() for out in (ours, theirs)]
    assert errors[0] <= errors[1], errors


def test_a_loop_of_long_rows():
    """More rows than are dequantised together."""
    q, cache, keywords = Call(B=4, S=32, Nq=8, Nkv=8, D=128, rows=40_000, dtype=BF16).draw()
    keywords["positions"] = np.arange(39_968, 40_000, dtype=np.int32) * np.ones((4, 1), np.int32)
    keywords["positions"][1] -= 20_000
    out = decode_attention(q, cache, **keywords)
    exact = decode_attention(q.astype(jnp.float32), cache, **keywords)
    assert np.abs(np.asarray(out, np.float32) - np.asarray(exact)).max() <= 2.0**-8 * 2.56
