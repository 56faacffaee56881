"""What compiling costs: one lowering however often a call is made, none where the cache has it."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import calls, process
from support.internals import modes

from jax_kvcache import KVCache, dequant_rope_quant_kvcache
from jax_kvcache.checkpoints import load_demo
from jax_kvcache.model import forward


@pytest.fixture
def lowerings(monkeypatch):
    """Each call of the rule that lowers the primitive, whichever mode it is in."""
    made = []
    partitioned = modes.partitioned

    def counted(ctx, call, *arguments):
        if call.name == "dequant_rope_quant_kvcache":
            made.append(ctx.avals_in[0].shape)
        return partitioned(ctx, call, *arguments)

    monkeypatch.setattr(modes, "partitioned", counted)
    return made


@pytest.mark.parametrize("kind", [None, AxisType.Auto, AxisType.Explicit], ids=str)
def test_one_lowering_for_all_layers(kind, lowerings):
    call = calls.ones(B=4, Nkv=2, Nq=4, C1=4)
    if kind is not None:
        mesh = jax.make_mesh((2, 2), ("dp", "tp"), (kind,) * 2)
        call = {n: jax.device_put(a, NamedSharding(mesh, P())) for n, a in call.items()}
    k_cache, v_cache = call.pop("k_cache"), call.pop("v_cache")

    def layers(caches, **call):
        return [dequant_rope_quant_kvcache(**call, k_cache=k, v_cache=v) for k, v in caches]

    caches = [(k_cache, v_cache)] * 8
    jax.jit(layers).lower(caches, **call)
    assert len(lowerings) == 1
    half = {name: call[name].astype(jnp.float16) for name in ("cos", "sin")}
    lowerings.clear()
    jax.jit(lambda caches: layers(caches, **call) + layers(caches, **call | half)).lower(caches)
    assert len(lowerings) == 2  # one for each dtype


def test_the_demo_models_layers_share_one(lowerings):
    model = load_demo()
    config = model.config
    cache = KVCache.create(
        1, 16, config.n_kv_heads, config.head_dim, layers=config.n_layers, **model.cache_params
    )
    tokens = jnp.zeros((1, 1), jnp.int32)
    jax.jit(forward).lower(model, tokens, cache, jnp.zeros(1, jnp.int32))
    assert len(lowerings) == 1


def test_compilation_cache_hits(tmp_path):
    """The second process compiles nothing, and no two options share an entry."""

    def run():
        return json.loads(process.run(process.PROGRAMS / "compile_in_modes.py", tmp_path))

    first, second = run(), run()
    assert list(first.values()) == [[0, 1]] * 5, first
    assert list(second.values()) == [[1, 0]] * 5, second
