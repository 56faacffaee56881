"""In automatic mode no cache takes its sharding from what comes before or after the operator."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import calls, hlo

from jax_kvcache import KVCache, decode_attention, dequant_rope_quant_kvcache

B, Nq, D, C2, WIDTH = 4, 8, 8, 512, 32


def place(mesh, value, *spec):
    return jax.device_put(value, NamedSharding(mesh, P(*spec)))


@pytest.mark.parametrize(
    ("Nkv", "tp", "cache_spec"),
    [
        (1, 4, P()),  # one kv head, which no device can share
        (2, 4, P()),  # fewer kv heads than devices
        (4, 4, P()),
        (2, 2, P("dp")),
        (4, 4, P(None, None, "tp")),
    ],
    ids=str,
)
def test_sharded_output_projection(Nkv, tp, cache_spec):
    """q is wanted over tp; the only communication is the all-reduce after the projection."""
    mesh = jax.make_mesh((4 // tp, tp), ("dp", "tp"), (AxisType.Auto,) * 2)
    call = calls.ones(B=B, Nq=Nq, Nkv=Nkv, D=D, C1=B, C2=C2)
    caches = [place(mesh, call.pop(name), *cache_spec) for name in ("k_cache", "v_cache")]
    call = {name: place(mesh, value) for name, value in call.items()}
    wo = place(mesh, jnp.ones((Nq * D, WIDTH), jnp.float32), "tp")

    def step(caches, call, wo):
        result = dequant_rope_quant_kvcache(**call, k_cache=caches[0], v_cache=caches[1])
        q = result.q.astype(jnp.float32).reshape(B, 1, -1)
        return q @ wo, [result.k_cache, result.v_cache]

    compiled = jax.jit(step, donate_argnums=0).lower(caches, call, wo).compile()
    assert hlo.collective_bytes(compiled.as_text()) == B * WIDTH * 4
    hlo.assert_in_place(compiled, caches[0].addressable_shards[0].data.size)
    for before, after in zip(caches, compiled.output_shardings[1], strict=True):
        assert after.is_equivalent_to(before.sharding, 4)


def test_attention_says_where_q_is_wanted():
    """The heads of q follow those of the cache that it attends to; nothing moves."""
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (AxisType.Auto,) * 2)
    call = calls.ones(B=B, Nq=Nq, Nkv=4, D=D, C1=B, C2=C2)
    ones = jnp.ones((4, D))
    cache = KVCache.create(B, C2, 4, D, scale_k=ones, scale_v=ones)
    where = KVCache(
        *[NamedSharding(mesh, P("dp", None, "tp"))] * 2,
        *[NamedSharding(mesh, P("tp"))] * 2,
        offset_k=None,
        offset_v=None,
        layers=None,
    )
    cache = jax.device_put(cache, where)
    tokens = {name: place(mesh, call[name], "dp") for name in ("x", "cos", "sin", "indices")}
    weight_scale = place(mesh, call["weight_scale"])

    def step(cache, tokens):
        where = (tokens[name] for name in ("x", "cos", "sin", "indices"))
        q, cache = cache.update(*where, weight_scale=weight_scale)
        lengths = jnp.full((B,), 1, jnp.int32)
        return decode_attention(q, cache, lengths), cache

    compiled = jax.jit(step, donate_argnums=0).lower(cache, tokens).compile()
    hlo.assert_in_place(compiled, B // 2 * C2 * 2 * D)
    moved = hlo.collective_bytes(compiled.as_text())
    assert moved <= 8, "no more than the longest length of the batch"


def test_attention_with_one_kv_head_wants_q_whole():
    """Each device has q and makes all heads; what comes after takes its own without a message."""
    mesh = jax.make_mesh((4,), ("tp",), (AxisType.Auto,))
    call = calls.ones(B=B, Nq=Nq, Nkv=1, D=D, C1=B, C2=C2)
    ones = jnp.ones((1, D))
    cache = place(mesh, KVCache.create(B, C2, 1, D, scale_k=ones, scale_v=ones))
    tokens = {n: place(mesh, call[n]) for n in ("x", "cos", "sin", "indices", "weight_scale")}
    wo = place(mesh, jnp.ones((Nq * D, WIDTH), jnp.float32), "tp")

    def step(cache, tokens, wo):
        where = (tokens[name] for name in ("x", "cos", "sin", "indices"))
        q, cache = cache.update(*where, weight_scale=tokens["weight_scale"])
        attended = decode_attention(q, cache, jnp.full((B,), 1, jnp.int32))
        return attended.astype(jnp.float32).reshape(B, 1, -1) @ wo, cache

    compiled = jax.jit(step, donate_argnums=0).lower(cache, tokens, wo).compile()
    hlo.assert_in_place(compiled, B * C2 * D)
    assert [kind for _, kind in hlo.collectives(compiled.as_text())] == ["all-reduce"]
