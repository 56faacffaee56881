"""On a GPU: donated caches are written where they are, also where a program reads them as well."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import calls, hlo

from jax_kvcache import KVCache, PagedKVCache, decode_attention, dequant_rope_quant_kvcache

pytestmark = pytest.mark.cuda_device

SIZES = {"B": 4, "S": 1, "Nq": 8, "Nkv": 2, "D": 64, "C1": 4, "C2": 4096}
B, Nq, Nkv, D, LENGTH, BLOCK = 4, 8, 2, 64, 4096, 64


@pytest.mark.parametrize("cache_mode", ["contiguous", "page"])
@pytest.mark.parametrize("levels", [0, 1])
def test_write(cache_mode, levels):
    call = calls.arguments(**SIZES, cache_mode=cache_mode)
    function = functools.partial(
        dequant_rope_quant_kvcache, cache_mode=cache_mode, kv_output=True, implementation="ffi"
    )
    if levels:
        function = jax.vmap(function)
        call = {k: jax.ShapeDtypeStruct((2, *v.shape), v.dtype) for k, v in call.items()}
    donated = jax.jit(function, donate_argnames=("k_cache", "v_cache"))
    compiled = donated.lower(**call).compile()
    hlo.assert_in_place(compiled, math.prod(call["k_cache"].shape))
    assert hlo.native_calls(compiled.as_text()) == 1


def make(kind):
    sizes = (B, LENGTH) if kind == "contiguous" else (B * LENGTH // BLOCK, BLOCK)
    cls = KVCache if kind == "contiguous" else PagedKVCache
    scale = np.full((Nkv, D), 0.3, np.float32)
    return cls.create(*sizes, Nkv, D, scale_k=scale, scale_v=scale)


def decode_step(kind):
    """A function of (cache, step) that writes one token per sequence and reads the cache."""
    rng = np.random.default_rng(0)
    arguments = {
        "x": rng.integers(-999, 999, (B, 1, (Nq + 2 * Nkv) * D), np.int32),
        "cos": np.ones((B, 1, 1, D), jnp.bfloat16),
        "sin": np.zeros((B, 1, 1, D), jnp.bfloat16),
        "weight_scale": np.full((Nq + 2 * Nkv) * D, 0.01, np.float32),
    }
    table = None
    if kind == "paged":
        table = rng.permutation(B * LENGTH // BLOCK).reshape(B, -1).astype(np.int32)
        arguments["block_table"] = table

    def step(cache, i):
        positions = jnp.full((B, 1) if kind == "paged" else (B,), 7 + i, jnp.int32)
        q, cache = cache.update(**arguments, positions=positions, implementation="ffi")
        lengths = jnp.full((B,), 8 + i, jnp.int32)
        out = decode_attention(q, cache, lengths, block_table=table, implementation="ffi")
        return cache, out

    return step


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("steps", [1, 8])
def test_write_and_attention_transpose_no_cache(kind, steps):
    def program(cache):
        return jax.lax.scan(decode_step(kind), cache, jnp.arange(steps))

    cache = make(kind)
    elements = cache.k_cache.size
    compiled = jax.jit(program, donate_argnums=0).lower(cache).compile()
    hlo.assert_in_place(compiled, elements)
    # A transposed cache would be a temporary of its size.
    assert compiled.memory_analysis().temp_size_in_bytes < elements
    before = cache.k_cache.unsafe_buffer_pointer()
    cache, out = compiled(cache)
    assert cache.k_cache.unsafe_buffer_pointer() == before
    assert np.isfinite(np.asarray(out, np.float32)).all()


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_many_calls_in_one_program(kind):
    """XLA records them in a CUDA graph; run again, it gives what the steps give one by one."""
    step = decode_step(kind)

    def unrolled(cache):
        outs = []
        for i in range(8):
            cache, out = step(cache, i)
            outs.append(out)
        return cache, jnp.stack(outs)

    together = jax.jit(unrolled)
    one = jax.jit(step)
    expected, outs = make(kind), []
    for i in range(8):
        expected, out = one(expected, i)
        outs.append(out)
    for _ in range(3):
        cache, got = together(make(kind))
        np.testing.assert_array_equal(cache.k_cache, expected.k_cache)
        np.testing.assert_array_equal(cache.v_cache, expected.v_cache)
        np.testing.assert_array_equal(got, jnp.stack(outs))
