"""Compiles a 70B-class model's cache update for 512 devices and prints what each device does.

80 layers, 64 q heads, 8 kv heads, D = 128, tensor parallel 8, data parallel 64, abstract shapes: no
array exists.  The fused projection is part of the program, sharded as users have it.  For each
implementation and layout, one line of JSON: bytes of the caches per device, bytes of everything
else, and the collectives, each with the bytes that a device holds as its result.
"""

import json

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import hlo

from jax_kvcache import dequant_rope_quant_kvcache

LAYERS, Nq, Nkv, D, MODEL = 80, 64, 8, 128, 8192
DP, TP = 64, 8
B, C2 = 16 * DP, 8192  # 16 sequences per data-parallel replica, 8192 rows each
H = (Nq + 2 * Nkv) * D
CACHE = P("dp", None, "tp")


def layer(h, w, params, caches, implementation):
    """The W8A8 projection of one token per sequence, and the update of the layer's caches."""
    x = lax.dot_general(h, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    result = dequant_rope_quant_kvcache(
        x, **params, k_cache=caches[0], v_cache=caches[1], implementation=implementation
    )
    return (result.k_cache, result.v_cache), result.q


def arguments(mesh):
    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    params = {
        "cos": array((B, D), jnp.bfloat16, P("dp")),
        "sin": array((B, D), jnp.bfloat16, P("dp")),
        "indices": array((B,), jnp.int32, P("dp")),
        "scale_k": array((Nkv, D), jnp.float32, P("tp")),
        "scale_v": array((Nkv, D), jnp.float32, P("tp")),
        "weight_scale": array((H,), jnp.float32, P("tp")),
        "activation_scale": array((B,), jnp.float32, P("dp")),
    }
    cache = array((B, C2, Nkv, D), jnp.int8, CACHE)
    h = array((B, MODEL), jnp.int8, P("dp"))
    w = array((MODEL, H), jnp.int8, P(None, "tp"))
    return h, w, params, (cache, cache)


def manual(mesh, implementation):
    """Columns interleaved when the weights were loaded: each device projects its own heads."""

    def one_device(*operands):
        return layer(*operands, implementation)

    specs = jax.tree.map(lambda a: a.sharding.spec, arguments(mesh))
    return jax.shard_map(
        one_device, mesh=mesh, in_specs=specs, out_specs=((CACHE, CACHE), P("dp", "tp"))
    )


def whole(mesh, implementation):
    """Columns in their plain order: x is gathered over the heads' devices."""
    return lambda *operands: layer(*operands, implementation)


LAYOUTS = {
    "shard_map, interleaved columns": (AxisType.Auto, manual),
    "automatic, plain columns": (AxisType.Auto, whole),
    "explicit, plain columns": (AxisType.Explicit, whole),
}


def simulate(name, implementation):
    kind, build = LAYOUTS[name]
    mesh = jax.make_mesh((DP, TP), ("dp", "tp"), (kind,) * 2)
    operands = arguments(mesh)
    # in a model, attention over the cache says that q is wanted over the heads' devices
    out = (
        tuple(a.sharding for a in operands[3]),
        NamedSharding(mesh, P("dp", "tp")) if kind == AxisType.Auto else None,
    )
    step = jax.jit(build(mesh, implementation), donate_argnums=3, out_shardings=out)
    compiled = step.lower(*operands).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    cache_bytes = 2 * B // DP * C2 * Nkv // TP * D
    hlo.assert_in_place(compiled, cache_bytes // 2)
    return {
        "layout": name,
        "implementation": implementation,
        "native call": hlo.native_calls(text),
        "cache bytes per layer and device": cache_bytes,
        "cache bytes per device": cache_bytes * LAYERS,
        "temporary bytes": memory.temp_size_in_bytes,
        "collectives": hlo.collectives(text),
        "collective bytes": hlo.collective_bytes(text),
    }


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DP * TP)
    for name in LAYOUTS:
        for implementation in ("ffi", "xla"):
            print(json.dumps(simulate(name, implementation)), flush=True)
