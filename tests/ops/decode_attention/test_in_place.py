"""decode_attention makes no copy of a cache."""

import jax
import jax.numpy as jnp
import pytest
from support.attention_calls import B, D, L, Nkv, Nq, attend

from jax_kvcache import KVCache, PagedKVCache, decode_attention


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_no_copy_of_the_cache_or_of_a_layer(kind):
    """The compiled program's temporaries are chunks, whatever the cache's size."""
    layer_bytes = 64 * 2048 * Nkv * D
    scales = jax.ShapeDtypeStruct((L, Nkv, D), jnp.float32)
    shape = (L, 64, 2048, Nkv, D) if kind == "contiguous" else (L, 4096, 32, Nkv, D)
    codes = jax.ShapeDtypeStruct(shape, jnp.int8)
    cls = KVCache if kind == "contiguous" else PagedKVCache
    cache = cls(codes, codes, scales, scales, scales, scales, L)
    table = None if kind == "contiguous" else jax.ShapeDtypeStruct((B, 64), jnp.int32)
    q = jax.ShapeDtypeStruct((B, 1, Nq, D), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((B,), jnp.int32)
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = attend.lower(q, cache, lengths, block_table=table, layer=layer).compile()
    chunk_bytes = B * 128 * Nkv * D * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * chunk_bytes < layer_bytes


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_a_long_prompt_takes_no_more_than_a_short_one(kind, implementation):
    """Queries go in tiles: beside q and the results there are one tile's sums, scores and rows."""
    rows = 8192
    scales = jax.ShapeDtypeStruct((Nkv, D), jnp.float32)
    shape = (1, rows, Nkv, D) if kind == "contiguous" else (rows // 16, 16, Nkv, D)
    codes = jax.ShapeDtypeStruct(shape, jnp.int8)
    cls = KVCache if kind == "contiguous" else PagedKVCache
    cache = cls(codes, codes, scales, scales, None, None, None)
    table = None if kind == "contiguous" else jax.ShapeDtypeStruct((1, rows // 16), jnp.int32)

    def temporary(steps):
        q = jax.ShapeDtypeStruct((1, steps, Nq, D), jnp.float32)
        positions = jax.ShapeDtypeStruct((1, steps), jnp.int32)
        jitted = jax.jit(decode_attention, static_argnames="implementation")
        compiled = jitted.lower(
            q, cache, positions=positions, block_table=table, implementation=implementation
        ).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    most, more = temporary(4096), (4096 - 1024) * Nq * D * 4
    assert most <= temporary(1024) + more + (1 << 16)  # JAX 0.10 holds q's tiles once more
    assert most < 4 << 20  # all scores together are 512 MB
