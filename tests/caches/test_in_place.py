"""The caches stay where they are: no copy of a cache, or of a layer, in the compiled programs."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support import hlo

from jax_kvcache import KVCache, PagedKVCache, decode_attention

B, Nq, Nkv, D, L = 4, 4, 2, 32, 3
H = (Nq + 2 * Nkv) * D
LENGTH, BLOCK = 4096, 64
LAYER_BYTES = B * LENGTH * Nkv * D  # of k or v


def make(kind, layers=None):
    sizes = (B, LENGTH) if kind == "contiguous" else (B * LENGTH // BLOCK, BLOCK)
    cls = KVCache if kind == "contiguous" else PagedKVCache
    scale = np.full((Nkv, D), 0.3, np.float32)
    return cls.create(*sizes, Nkv, D, layers=layers, scale_k=scale, scale_v=scale)


def call(kind, steps=1):
    rng = np.random.default_rng(0)
    arguments = {
        "x": rng.integers(-999, 999, (B, steps, H), np.int32),
        "cos": np.ones((B, steps, 1, D), ml_dtypes.bfloat16),
        "sin": np.zeros((B, steps, 1, D), ml_dtypes.bfloat16),
        "weight_scale": np.full(H, 0.01, np.float32),
    }
    positions = np.arange(7, 7 + steps, dtype=np.int32)
    table = rng.permutation(B * LENGTH // BLOCK).reshape(B, -1).astype(np.int32)
    if kind == "contiguous":
        return arguments | {"positions": np.full(B, 7, np.int32)}
    return arguments | {"positions": np.tile(positions, (B, 1)), "block_table": table}


def one_step(cache, arguments):
    """Update, then attention over the same cache."""
    q, cache = cache.update(**arguments)
    lengths = jnp.full((B,), 8, jnp.int32)
    return decode_attention(q, cache, lengths, block_table=arguments.get("block_table")), cache


def scan_layers(cache, arguments):
    def layer(cache, i):
        q, cache = cache.update(**arguments, layer=i)
        table = arguments.get("block_table")
        lengths = jnp.full((B,), 8, jnp.int32)
        return cache, decode_attention(q, cache, lengths, block_table=table, layer=i)

    cache, out = jax.lax.scan(layer, cache, jnp.arange(L))
    return out, cache


def loop_over_layers(cache, arguments):
    def layer(i, carry):
        total, cache = carry
        q, cache = cache.update(**arguments, layer=i)
        return total + q.astype(jnp.float32), cache

    total = jnp.zeros((B, 1, Nq, D))
    return jax.lax.fori_loop(0, L, layer, (total, cache))


def static_layers(cache, arguments):
    outs = []
    for i in range(L):
        q, cache = cache.update(**arguments, layer=i)
        outs.append(q)
    return outs, cache


def scan_over_steps_and_layers(cache, arguments):
    def step(cache, _):
        out, cache = scan_layers(cache, arguments)
        return cache, out

    cache, out = jax.lax.scan(step, cache, None, length=4)
    return out, cache


CASES = [
    (one_step, None),
    (static_layers, L),
    (loop_over_layers, L),
    (scan_over_steps_and_layers, L),
]


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize(("function", "layers"), CASES, ids=[f.__name__ for f, _ in CASES])
def test_in_place(function, layers, kind, implementation):
    cache = make(kind, layers)
    arguments = call(kind)
    step = lambda cache, arguments: function(  # noqa: E731
        cache, arguments | {"implementation": implementation}
    )
    compiled = jax.jit(step, donate_argnums=0).lower(cache, arguments).compile()
    assert hlo.cache_copies(compiled.as_text(), LAYER_BYTES) == []
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < LAYER_BYTES
    assert memory.alias_size_in_bytes >= 2 * LAYER_BYTES * (layers or 1)
    pointers = [a.unsafe_buffer_pointer() for a in (cache.k_cache, cache.v_cache)]
    _, after = compiled(cache, arguments)
    assert cache.k_cache.is_deleted()
    assert pointers == [a.unsafe_buffer_pointer() for a in (after.k_cache, after.v_cache)]
    written = np.asarray(after.k_cache).reshape(layers or 1, -1, Nkv, D).any(axis=(2, 3))
    assert written.sum(axis=1).tolist() == [B] * (layers or 1)


def test_the_reader_of_copies_sees_a_copy():
    cache = make("contiguous")
    compiled = jax.jit(one_step).lower(cache, call("contiguous")).compile()  # nothing donated
    assert hlo.cache_copies(compiled.as_text(), LAYER_BYTES) != []
