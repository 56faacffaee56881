"""decode_attention makes no copy of a cache."""

import jax
import jax.numpy as jnp
import pytest
from support.attention_calls import B, D, L, Nkv, Nq, attend

from jax_kvcache import KVCache, PagedKVCache


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
