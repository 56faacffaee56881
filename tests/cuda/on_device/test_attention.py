"""decode_attention on a GPU: float64's results within the promised accuracy, all head sizes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from support import attention
from support.attention import BF16, CALLS, Call
from support.internals import cuda

from jax_kvcache import decode_attention

pytestmark = pytest.mark.cuda_device

# Tensor cores drop the bits that float32 has no room for, at each of D / 8 additions. So the
# log-sum-exp, which has the error of one score, is less exact than on a CPU.
check = functools.partial(attention.check, implementation="ffi", lse_error=2.0**-18)

TAKEN = {
    name: call if call.D in cuda.HEAD_DIMS else call._replace(D=64)
    for name, call in CALLS.items()
    if call.S <= cuda.MAX_QUERIES
}


@pytest.mark.parametrize("name", TAKEN)
def test_case(name):
    check(TAKEN[name])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
def test_head_sizes(head_dim, kind, dtype):
    call = Call(kind=kind, D=head_dim, B=2, S=2, Nq=14, Nkv=2, rows=700, block=48, dtype=dtype)
    check(call)
    check(call._replace(offset=9.0, soft_cap=4.0, sinks=True, window=300))


@pytest.mark.parametrize("heads", [1, 4, 7, 8, 16, 17, 40])
@pytest.mark.parametrize("steps", [1, 3, 16])
def test_query_rows(heads, steps):
    check(Call(D=128, B=2, S=steps, Nq=2 * heads, Nkv=2, rows=300))


@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_scores_of_every_size(size):
    check(Call(D=128, S=1, rows=500, q_size=size))


def test_lengths_that_differ():
    """One long sequence among short ones, in one batch."""
    q, cache, keywords = Call(D=128, B=16, S=1, Nq=8, Nkv=2, rows=20_000).draw()
    keywords["positions"] = np.full((16, 1), 5, np.int32)
    keywords["positions"][3] = 19_999
    keywords["positions"][7] = -1
    out = decode_attention(q, cache, implementation="ffi", **keywords)
    expected, _, score, value = attention.in_float64(q, cache, **keywords)
    attention.assert_close(out, expected, value, score)


def test_vmap_equals_a_loop():
    calls = [Call(D=64, B=2, rows=300).draw(seed) for seed in range(3)]
    q, cache, positions = jax.tree.map(
        lambda *a: np.stack(a), *[(q, c, k["positions"]) for q, c, k in calls]
    )

    def run(q, cache, positions):
        return decode_attention(q, cache, positions=positions, implementation="ffi")

    mapped = jax.jit(jax.vmap(run))(q, cache, positions)
    shared = dataclasses.replace(cache, k_cache=calls[0][1].k_cache)
    axes = dataclasses.replace(jax.tree.map(lambda _: 0, cache), k_cache=None)
    mapped_v = jax.jit(jax.vmap(run, (0, axes, 0)))(q, shared, positions)
    for i, (one, own, keywords) in enumerate(calls):
        alone = run(one, own, keywords["positions"])
        np.testing.assert_allclose(mapped[i], alone, rtol=1e-5, atol=1e-5)
        own_v = dataclasses.replace(own, k_cache=calls[0][1].k_cache)
        alone = run(one, own_v, keywords["positions"])
        np.testing.assert_allclose(mapped_v[i], alone, rtol=1e-5, atol=1e-5)
