"""A small call of every public function, for tests of what must hold for all of them."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import jax_kvcache
from jax_kvcache import KVCache, PagedKVCache, numerics

B, S, Nq, Nkv, D, ROWS, T = 2, 1, 4, 2, 4, 8, 6
H = (Nq + 2 * Nkv) * D
SPLITS = (Nq * D, Nkv * D, Nkv * D)


@functools.cache
def arrays() -> dict[str, Any]:
    """What the calls take, made once and outside every mode."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    values, scale = normal(5, Nkv, D), jnp.full((Nkv, D), 0.02, jnp.float32)
    positions = jnp.array([0, 3], jnp.int32)
    scales = {"scale_k": scale, "scale_v": scale}
    offsets = {"offset_k": 3 * jnp.ones_like(scale), "offset_v": jnp.zeros_like(scale)}
    x, weight_scale = jnp.full((B, S, H), 1000, jnp.int32), jnp.full((H,), 1e-3, jnp.float32)
    cos, sin = jax_kvcache.rope_tables(positions[:, None], D)
    observers = {name: getattr(numerics, name).create((Nkv, D)) for name in ("MinMax", "Sketch")}
    return {
        "values": values, "scale": scale, "offset": offsets["offset_k"], "positions": positions,
        "scales": scales, "offsets": offsets, "weight_scale": weight_scale,
        "tokens": {"x": x, "cos": cos, "sin": sin},
        "apart": tuple(jnp.split(x, np.cumsum(SPLITS)[:2], -1)),
        "weights_apart": tuple(jnp.split(weight_scale, np.cumsum(SPLITS)[:2])),
        "caches": {n: jnp.full((B, ROWS, Nkv, D), i, jnp.int8)
                   for i, n in enumerate(("k_cache", "v_cache"))},
        "cache": KVCache.create(B, ROWS, Nkv, D, **scales, **offsets),
        "layered": KVCache.create(B, ROWS, Nkv, D, layers=2, **scales, **offsets),
        "paged": PagedKVCache.create(4, ROWS, Nkv, D, **scales),
        "table": jnp.array([[0, 1], [2, 3]], jnp.int32),
        "one": jnp.ones((), jnp.int32),
        "q": normal(B, S, Nq, D),
        "prompt": normal(2, B, T, Nkv, D),
        "lses": [normal(B, S, Nq), normal(B, S, Nq)],
        "sinks": normal(Nq),
        "weight": normal(3, H),
        "min_max": observers["MinMax"].update(values),
        "sketch": observers["Sketch"].update(values),
        "errors": numerics.ErrorObserver.create((Nkv, D)).update(values, scale),
        "queries": normal(T, Nq, D), "keys": normal(T, Nkv, D), "near": normal(T, Nkv, D),
        "logits": normal(3, 7), "baseline": normal(3, 7),
    }  # fmt: skip


def calls() -> dict[str, Callable[[Any], Any]]:
    """What each call does with `arrays()`."""
    attention, nm = jax_kvcache.decode_attention, numerics

    def operator(a, **changed):
        call = a["tokens"] | a["caches"] | a["scales"] | a["offsets"]
        call |= {"indices": a["positions"], "weight_scale": a["weight_scale"]}
        return call | changed

    def update(a, cache, **more):
        arguments = {"positions": a["positions"], "weight_scale": a["weight_scale"]} | more
        return a[cache].update(**a["tokens"], **arguments)

    def page(a):
        return {"positions": a["positions"][:, None], "block_table": a["table"]}

    def calibrate(method, symmetric):
        return lambda a: nm.calibrate(a["sketch"], method=method, symmetric=symmetric)

    def in_format(name):
        with_offset = name in ("int8 per channel",)
        return lambda a: nm.FORMATS[name](
            a["values"], nm.Calibration(a["scale"], a["offset"] if with_offset else None)
        )

    return {
        "dequant_rope_quant_kvcache": lambda a: jax_kvcache.dequant_rope_quant_kvcache(
            **operator(a)
        ),
        "dequant_rope_quant_kvcache, (q, k, v)": lambda a: jax_kvcache.dequant_rope_quant_kvcache(
            **operator(a, x=a["apart"], weight_scale=a["weights_apart"])
        ),
        "explain": lambda a: str(jax_kvcache.explain(**operator(a))),
        "rope_tables": lambda a: jax_kvcache.rope_tables(a["positions"][:, None], D),
        "KVCache.create": lambda a: KVCache.create(B, ROWS, Nkv, D, layers=2, **a["scales"]),
        "PagedKVCache.create": lambda a: PagedKVCache.create(4, ROWS, Nkv, D, **a["scales"]),
        "KVCache.update": lambda a: update(a, "cache"),
        "KVCache.update, a layer": lambda a: update(a, "layered", layer=1),
        "KVCache.update, a traced layer": lambda a: update(a, "layered", layer=a["one"]),
        "PagedKVCache.update": lambda a: update(a, "paged", **page(a)),
        "KVCache.dequantize": lambda a: a["layered"].dequantize(jnp.bfloat16),
        "KVCache.saturation": lambda a: a["layered"].saturation(a["positions"]),
        "PagedKVCache.saturation": lambda a: a["paged"].saturation(
            a["positions"], block_table=a["table"]
        ),
        "KVCache.calibrated": lambda a: KVCache.calibrated(
            a["prompt"], a["prompt"], ROWS, lengths=a["positions"] + a["one"], num_q_heads=Nq
        ),
        "PagedKVCache.copy_blocks": lambda a: a["paged"].copy_blocks(
            a["positions"], a["positions"] - a["one"]
        ),
        "slots_from_block_table": lambda a: jax_kvcache.slots_from_block_table(
            a["table"], a["positions"][:, None], ROWS
        ),
        "decode_attention": lambda a: attention(a["q"], a["cache"], a["positions"] + a["one"]),
        "decode_attention, a layer": lambda a: attention(
            a["q"], a["layered"], positions=a["positions"][:, None], layer=1, window=3,
            soft_cap=5.0, return_lse=True,
        ),
        "decode_attention, pages": lambda a: attention(
            a["q"], a["paged"], a["positions"], block_table=a["table"]
        ),
        "explain_attention": lambda a: str(
            jax_kvcache.explain_attention(a["q"], a["cache"], a["positions"])
        ),
        "merge_attention": lambda a: jax_kvcache.merge_attention([a["q"]] * 2, a["lses"]),
        "merge_attention, sinks": lambda a: jax_kvcache.merge_attention(
            [a["q"]] * 2, a["lses"], a["sinks"]
        ),
        "interleave": lambda a: jax_kvcache.interleave_qkv_for_tensor_parallel(
            a["weight"], SPLITS, 2, head_dim=D
        ),
        "deinterleave": lambda a: jax_kvcache.deinterleave_qkv_for_tensor_parallel(
            a["weight"], SPLITS, 2
        ),
        "MinMax": lambda a: nm.MinMax.create((Nkv, D)).update(a["values"]).merge(a["min_max"]),
        "MinMax.absolute_maximum": lambda a: a["min_max"].absolute_maximum(),
        "Sketch": lambda a: nm.Sketch.create((Nkv, D)).update(a["values"]).merge(a["sketch"]),
        "Sketch.quantiles": lambda a: a["sketch"].quantiles(0.1),
        "Sketch.magnitude_quantile": lambda a: a["sketch"].magnitude_quantile(0.1),
        "Sketch.edges": lambda a: a["sketch"].edges(),
        "ErrorObserver": lambda a: nm.ErrorObserver.create((Nkv, D)).update(
            a["values"], a["scale"], a["offset"]
        ).merge(a["errors"]),
        "ErrorObserver.per_channel": lambda a: a["errors"].per_channel(),
        "ErrorObserver.total": lambda a: a["errors"].total(),
        "ErrorObserver.layer": lambda a: a["errors"].layer(1),
        "observe": lambda a: nm.observe({"k": a["min_max"]}, {"k": a["values"]}),
        "merge": lambda a: nm.merge({"k": a["min_max"]}, {"k": a["min_max"]}),
        "calibrate, nothing seen": lambda a: nm.calibrate(nm.MinMax.create((Nkv, D))),
        **{f"calibrate, {m}": calibrate(m, True) for m in nm.METHODS},
        **{f"calibrate, {m}, offset": calibrate(m, False) for m in nm.METHODS if m != "absmax"},
        "scale_and_offset": lambda a: nm.scale_and_offset(a["min_max"].low, a["min_max"].high),
        "fake_quantize": lambda a: nm.fake_quantize(a["values"], a["scale"]),
        "fake_quantize, offset": lambda a: nm.fake_quantize(a["values"], a["scale"], a["offset"]),
        **{f"format {name}": in_format(name) for name in nm.FORMATS},
        "sqnr": lambda a: nm.sqnr(a["keys"], a["near"], axis=0),
        "attention_error": lambda a: nm.attention_error(
            a["queries"], a["keys"], a["keys"], a["near"], a["near"]
        ),
        "token_agreement": lambda a: nm.token_agreement(a["logits"], a["baseline"]),
        "divergence": lambda a: nm.divergence(a["logits"], a["baseline"]),
        "paired_difference": lambda a: nm.paired_difference(a["logits"][0], a["baseline"][0]),
    }  # fmt: skip
