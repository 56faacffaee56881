"""A user's program, checked with `mypy --strict`: generic over both caches, and with numerics."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvcache import (
    BlockAllocator,
    KVCache,
    PagedKVCache,
    decode_attention,
    explain_attention,
    numerics,
    rope_tables,
)

Cache = TypeVar("Cache", KVCache, PagedKVCache)
Nq, Nkv, D = 4, 2, 16


def attend(
    cache: Cache, x: jax.Array, positions: jax.Array, block_table: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
    """One layer's step, for either cache."""
    cos, sin = rope_tables(positions, D, dtype=jnp.float32)
    where = positions[:, 0] if block_table is None else positions
    q, cache = cache.update(x, cos, sin, where, block_table=block_table)
    return decode_attention(q, cache, positions=positions, block_table=block_table), cache


def scales(cache: KVCache | PagedKVCache, k: jax.Array, v: jax.Array) -> list[numerics.Calibration]:
    """Scales for K and V, by two methods, and one error that is measured with them."""
    observers = {name: numerics.Sketch.create((Nkv, D)) for name in "kv"}
    observers = numerics.observe(observers, {"k": k, "v": v})
    found = numerics.calibrate(observers, method="mse")
    again = numerics.calibrate(numerics.MinMax.create((Nkv, D)).update(k), symmetric=True)
    errors = numerics.ErrorObserver.create((Nkv, D)).update(k, found["k"].scale)
    share: jax.Array = errors.total().saturation_rate
    low, high = observers["k"].merge(observers["v"]).quantiles(0.01)
    print(cache.nbytes, float(share), numerics.sqnr(k, v), low.shape == high.shape)
    return [found["k"], found["v"], again]


def main() -> None:
    """Runs both caches on the same tokens."""
    scale = jnp.full((Nkv, D), 0.05)
    x = jax.random.normal(jax.random.key(0), (2, 3, (Nq + 2 * Nkv) * D))
    positions = jnp.tile(jnp.arange(3, dtype=jnp.int32), (2, 1))
    cache = KVCache.create(2, 8, Nkv, D, scale_k=scale, scale_v=scale)
    out, cache = attend(cache, x, positions)

    allocator = BlockAllocator(num_blocks=8, block_size=4)
    prompts: list[int] = [allocator.allocate(2) for _ in range(2)]
    copies = np.array([allocator.append(prompt) for prompt in prompts], np.int32)
    paged = PagedKVCache.create(8, 4, Nkv, D, scale_k=scale, scale_v=scale)
    paged = paged.copy_blocks(*copies.T)
    table = jnp.asarray(allocator.block_table(prompts, columns=2))
    paged_out, paged = attend(paged, x, positions, table)
    assert jnp.array_equal(out, paged_out)

    k = x[..., Nq * D : (Nq + Nkv) * D].reshape(2, 3, Nkv, D)
    q, k, v, paged = paged.update(
        x, *rope_tables(positions, D, dtype=jnp.float32), positions, block_table=table,
        kv_output=True,
    )  # fmt: skip
    print([calibration.scale.shape for calibration in scales(paged, k, v)])
    print(explain_attention(q, paged, positions=positions, block_table=table).reason)
    print(paged)


if __name__ == "__main__":
    main()
