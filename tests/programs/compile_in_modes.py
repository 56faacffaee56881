"""Compiles the operator in every sharding mode; prints the compilation cache's hits and misses."""

import functools
import json
import sys
from collections import Counter

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support import layouts

from jax_kvcache import dequant_rope_quant_kvcache

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)

events: Counter[str] = Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
LAYOUT = layouts.LAYOUTS["batch_heads"]


def compile_step(kind, wrap=lambda step, mesh: step, **options):
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (kind,) * 2)
    arguments = layouts.placed(LAYOUT, mesh)
    events.clear()
    step = functools.partial(dequant_rope_quant_kvcache, **options)
    jax.jit(wrap(step, mesh)).lower(**arguments).compile()
    return [events[f"/jax/compilation_cache/cache_{what}"] for what in ("hits", "misses")]


def manual(step, mesh):
    def shard(arguments):
        return tuple(step(**arguments))[3:]

    where = layouts.specs(LAYOUT) | dict.fromkeys(("x", "weight_scale", "bias"), P())
    where["x"] = P("dp", None, "tp")
    where["weight_scale"] = where["bias"] = P("tp")
    whole = jax.shard_map(shard, mesh=mesh, in_specs=(where,), out_specs=LAYOUT.cache)
    return lambda **arguments: whole(arguments)


found = {
    "automatic": compile_step(AxisType.Auto),
    "automatic xla": compile_step(AxisType.Auto, implementation="xla"),
    "automatic promised": compile_step(AxisType.Auto, indices_mode="promise_in_bounds"),
    "explicit": compile_step(AxisType.Explicit),
    "manual": compile_step(AxisType.Auto, manual),
}
print(json.dumps(found))
