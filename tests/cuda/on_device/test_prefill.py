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
@pytest.mark.parametrize("order", ["consecutive", "padded", "any"])
def test_prefill(name, order):
    """Positions that follow each other, as in a prompt, also with padding, and any positions."""
    call = CALLS[name]
    q, cache, keywords = call.draw()
    if order != "any":
        first = np.array([call.rows - call.S, 0, 5][: call.B], np.int32)
        keywords["positions"] = first[:, None] + np.arange(call.S, dtype=np.int32)
    if order == "padded":
        keywords["positions"][0, :3] = keywords["positions"][-1, -9:] = -1
    run = jax.jit(lambda q, cache: decode_attention(q, cache, return_lse=True, **keywords))
    check(run(q, cache), call, q, cache, keywords)


LENGTHS = {
    "a prompt": Call(B=3, S=130, D=64, rows=700, dtype=BF16),
    "more queries than rows": Call(B=3, S=300, D=128, rows=200, dtype=BF16),
    "window": Call(B=3, S=130, D=64, rows=700, window=150, dtype=BF16),
    "layers": Call(B=3, S=64, D=80, rows=300, layers=2, dtype=BF16),
    "paged": Call(kind="paged", B=3, S=600, D=128, rows=3000, block=16, dtype=BF16),
    "missing blocks": Call(
        kind="paged", B=3, S=130, D=64, rows=700, block=16, holes=True, dtype=BF16
    ),
    "offsets and sinks": Call(B=3, S=70, D=64, rows=200, offset=9.0, sinks=True, dtype=BF16),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths(name):
    """A prompt given by its length, also one that is shorter than the queries."""
    call = LENGTHS[name]
    q, cache, keywords = call.draw()
    lengths = np.array([call.rows, 7, call.rows + 25], np.int32)
    del keywords["positions"]
    results = decode_attention(q, cache, lengths, return_lse=True, **keywords)
    keywords["positions"] = lengths[:, None] + np.arange(-call.S, 0, dtype=np.int32)
    check(results, call, q, cache, keywords)


@pytest.mark.parametrize("given", ["positions", "lengths"])
def test_mesh_of_one_device(given):
    q, cache, keywords = Call(B=2, S=64, Nkv=2, D=64, rows=300, dtype=BF16).draw()
    if given == "lengths":
        keywords = {"lengths": np.array([300, 40], np.int32)}
    run = jax.jit(lambda q, cache: decode_attention(q, cache, **keywords))
    alone = run(q, cache)
    mesh = jax.make_mesh((1,), ("heads",), (AxisType.Auto,))
    with jax.set_mesh(mesh):
        heads = NamedSharding(mesh, PartitionSpec(None, None, "heads"))
        q = jax.device_put(q, heads)
        k_cache, v_cache = jax.device_put((cache.k_cache, cache.v_cache), heads)
        on_mesh = run(q, dataclasses.replace(cache, k_cache=k_cache, v_cache=v_cache))
    np.testing.assert_array_equal(on_mesh, alone)


@pytest.mark.parametrize("given", ["positions", "lengths"])
def test_no_worse_than_a_bfloat16_cache(given):
    """The mean error is at most that of cuDNN over a bfloat16 cache of the exact values."""
    call = Call(B=1, S=96, D=64, rows=1100, q_size=0.2, spread=8.0, dtype=BF16)
    q, cache, keywords = call.draw()
    positions = np.arange(call.rows - call.S, call.rows, dtype=np.int32)[None]
    keywords["positions"] = positions
    if given == "lengths":
        ours = decode_attention(q, cache, np.array([call.rows], np.int32))
    else:
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
