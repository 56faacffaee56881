"""Where the arrays of `public_calls` may lie on an explicit mesh."""

import dataclasses

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support import public_calls

_HEADS, _TOKENS = P("tp"), P("dp")
_KV = P("dp", None, "tp")


def _of_cache(cache, codes, channels):
    fields = {"k_cache": codes, "v_cache": codes, "scale_k": channels, "scale_v": channels}
    for name in ("offset_k", "offset_v"):
        fields[name] = None if getattr(cache, name) is None else channels
    return dataclasses.replace(cache, **fields)


def placed(mesh):
    """Tokens and sequences over dp, heads and columns over tp."""
    arrays = dict(public_calls.arrays())
    where = {
        "values": P(None, "tp"),
        "scale": _HEADS,
        "offset": _HEADS,
        "positions": _TOKENS,
        "weight_scale": _HEADS,
        "table": _TOKENS,
        "q": _KV,
        "prompt": P(None, *_KV),
        "sinks": _HEADS,
        "weight": P(None, "tp"),
        "queries": P("dp", "tp"),
        "keys": P("dp", "tp"),
        "near": P("dp", "tp"),
        "logits": P(None, None),
        "baseline": P(None, None),
        "one": P(),
    }
    specs = {name: jax.tree.map(lambda _: P(), value) for name, value in arrays.items()}
    specs |= where
    specs["lses"] = [_KV, _KV]
    for name in ("min_max", "sketch", "errors"):
        specs[name] = jax.tree.map(lambda _: _HEADS, arrays[name])
    for name, lead in (("cache", ()), ("layered", (None,)), ("paged", ())):
        specs[name] = _of_cache(arrays[name], P(*lead, *_KV), P(*lead, "tp"))
    return jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), arrays, specs)
