"""The documented example: scales for a model of one's own, from what `update` returns."""

import inspect
import textwrap

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvcache import KVCache, numerics, rope_tables

B, S, Nq, Nkv, D, length = 2, 6, 4, 2, 16, 32
H = (Nq + 2 * Nkv) * D


def test_the_documented_example():
    lines = inspect.getdoc(numerics).splitlines()
    code = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")))
    assert len(code.splitlines()) <= 10
    rng = np.random.default_rng(0)
    names = {
        "B": B, "S": S, "Nkv": Nkv, "D": D, "length": length, "jnp": jnp, "KVCache": KVCache,
        "numerics": numerics, "starts": jnp.zeros(B, jnp.int32),
        "prompts": jnp.asarray(rng.integers(-9999, 9999, (3, B, S, H)), jnp.int32),
        "weight_scale": jnp.asarray(rng.uniform(1e-4, 1e-3, H), jnp.float32),
    }  # fmt: skip
    positions = jnp.tile(jnp.arange(S, dtype=jnp.int32), (B, 1))
    names["cos"], names["sin"] = rope_tables(positions, D, dtype=jnp.float32)
    exec(code, names)

    cache = names["cache"]
    seen = names["prompts"].astype(jnp.float32) * names["weight_scale"]
    v = np.asarray(seen[..., -Nkv * D :]).reshape(-1, Nkv, D)
    largest = np.abs(v).max(0) / 127
    assert np.all(cache.scale_v <= largest * 1.001)  # "mse" shrinks the range
    assert np.all(cache.scale_v > largest * 0.2)
    restored = numerics.fake_quantize(jnp.asarray(v), cache.scale_v).values
    assert numerics.sqnr(jnp.asarray(v), restored) > 40
    assert jax.tree.leaves(cache.k_cache)[0].shape == (B, length, Nkv, D)
