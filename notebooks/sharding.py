# %% [markdown]
# # How does a call lie on several devices, and what moves between them?
#
# The operator follows the caches: a row is written on the device that stores it, and a cache never
# moves. The batch (in page mode the blocks) and the kv heads may be split over devices; the
# dimension D of a head may not. What does move depends on how the tokens and the projection's
# columns lie beside the caches, and on which of JAX's three modes the program uses: automatic,
# explicit or manual (`jax.shard_map`). This notebook runs the layouts of `layouts.json` on four CPU
# devices in these modes, and reads from the compiled programs how many bytes each device receives.

# %%
import functools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_kvcache

jax.config.update("jax_num_cpu_devices", 4)
TABLE = json.loads(pathlib.Path("layouts.json").read_text())
LAYOUTS = TABLE["layouts"]
B, S, Nq, Nkv, D, C2 = 8, 1, 8, 4, 32, 256  # one decode step of 8 sequences
H = (Nq + 2 * Nkv) * D
SPLITS = (Nq * D, Nkv * D, Nkv * D)  # the widths of q, k and v in x
for name, layout in LAYOUTS.items():
    print(f"{name:20} {layout['about']}")

# %% [markdown]
# ## One call, and the answer on one device


# %%
@functools.cache
def arguments(cache_mode, C1):
    """Host arrays; no two tokens share a row of the cache."""
    rng = np.random.default_rng(0)
    slots = rng.permutation(C1 * C2)[:B] if cache_mode == "page" else rng.integers(0, C2, B)
    cos, sin = jax_kvcache.rope_tables(slots[:, None], D, 10_000.0, jnp.bfloat16)
    return dict(
        x=rng.integers(-4000, 4000, (B, S, H)).astype(np.int32),
        cos=np.asarray(cos), sin=np.asarray(sin),
        k_cache=np.zeros((C1, C2, Nkv, D), np.int8), v_cache=np.zeros((C1, C2, Nkv, D), np.int8),
        indices=slots.astype(np.int32).reshape((B, S) if cache_mode == "page" else (B,)),
        scale_k=np.full((Nkv, D), 0.05, np.float32), scale_v=np.full((Nkv, D), 0.05, np.float32),
        weight_scale=rng.uniform(1e-4, 1e-3, H).astype(np.float32),
        bias=rng.normal(size=H).astype(np.float32),
    )  # fmt: skip


def call_of(layout):
    return arguments(layout["cache_mode"], layout["C1_over_B"] * B)


def operator(layout):
    return functools.partial(
        jax_kvcache.dequant_rope_quant_kvcache, kv_output=True, cache_mode=layout["cache_mode"]
    )


@functools.cache
def expected(cache_mode, C1):
    result = jax_kvcache.dequant_rope_quant_kvcache(
        **arguments(cache_mode, C1), kv_output=True, cache_mode=cache_mode
    )
    return [np.asarray(array) for array in result]


# %% [markdown]
# ## The layouts
#
# `layouts.json` gives the mesh axes of each named dimension; from these follows the
# `PartitionSpec` of every argument and result. The picture shows which of the devices 0 to 3 has
# which part of `x` (tokens from top to bottom, columns from left to right) and of the caches (from
# top to bottom the blocks, for `block_rows` the rows of a block; from left to right the kv heads).


# %%
def specs(layout, of="arguments", **axes):
    """The PartitionSpec of each argument, or of each result."""
    axes = layout["axes"] | axes

    def entry(dimension):
        axis = axes.get(dimension)
        return tuple(axis) if isinstance(axis, list) else axis

    return {name: P(*map(entry, dimensions)) for name, dimensions in TABLE[of].items()}


def draw(axis, sharding, shape, rows, columns):
    """Colours each part of one array, seen as rows by columns, by the devices that have it."""
    owners = {}
    for device, part in sharding.devices_indices_map(shape).items():
        ends = [
            (part[i].start or 0, shape[i] if part[i].stop is None else part[i].stop)
            for i in (rows, columns)
        ]
        owners.setdefault(tuple(ends), []).append(device.id)
    for ((top, bottom), (left, right)), devices in owners.items():
        color = plt.cm.viridis(0.3 + 0.7 * np.mean(devices) / 3)
        box = plt.Rectangle((left, top), right - left, bottom - top, facecolor=color, edgecolor="k")
        axis.add_patch(box)
        text = " ".join(map(str, sorted(devices)))
        axis.text((left + right) / 2, (top + bottom) / 2, text, ha="center", va="center")
    axis.set(xlim=(0, shape[columns]), ylim=(shape[rows], 0), xticks=[], yticks=[])


plt.rcParams.update({"figure.dpi": 75, "font.size": 10})
mesh = jax.make_mesh((2, 2), ("dp", "tp"), (AxisType.Auto,) * 2)
figure, axes = plt.subplots(2, len(LAYOUTS), figsize=(13, 4), layout="constrained")
for (name, layout), column in zip(LAYOUTS.items(), axes.T, strict=True):
    where, call = specs(layout), call_of(layout)
    cache_rows = 1 if "rows" in layout["axes"] else 0
    draw(column[0], NamedSharding(mesh, where["x"]), call["x"].shape, 0, 2)
    draw(column[1], NamedSharding(mesh, where["k_cache"]), call["k_cache"].shape, cache_rows, 2)
    column[0].set_title(name.replace("_", "\n"))
axes[0, 0].set_ylabel("x")
axes[1, 0].set_ylabel("k_cache, v_cache")
plt.show()

# %% [markdown]
# ## Automatic and explicit mode
#
# In both the program calls the operator on whole arrays, whose columns are in the plain order
# [q | k | v]. In automatic mode XLA's partitioner asks the operator what to do for the layout that
# it found; in explicit mode the layout is part of the arrays' types while JAX traces. Automatic
# mode needs XLA's custom partitioning, which only XLA's own platforms (CPU, GPU, TPU) have. There
# the step names its results in `out_shardings`: without them XLA matches donated buffers to results
# by their bytes, and a result as large as a cache may take its buffer, so that the cache is copied.


# %%
def compiled_whole(layout, kind):
    """The step compiled for arrays that lie as the table says, and the arrays."""
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (kind,) * 2)
    where, results = specs(layout), specs(layout, "results")
    call = {
        name: jax.device_put(array, NamedSharding(mesh, where[name]))
        for name, array in call_of(layout).items()
    }
    out_shardings = None  # in explicit mode they follow from the types
    if kind == AxisType.Auto:
        wanted = [NamedSharding(mesh, spec) for spec in results.values()]
        out_shardings = jax_kvcache.DequantRopeQuantKvcacheResult(*wanted)
    step = jax.jit(
        operator(layout), donate_argnames=("k_cache", "v_cache"), out_shardings=out_shardings
    )
    return step.lower(**call).compile(), call


# %% [markdown]
# ## `jax.shard_map`
#
# In manual mode each device calls the operator on its own arrays, and nothing moves unless the
# program says so:
#
# - Each device needs the q, k and v columns of its own heads. `interleave_qkv_for_tensor_parallel`
#   puts the columns into that order, once, when the weights are loaded: in the projection's weight,
#   in `weight_scale` and in `bias`. Here it is applied to `x` itself. `qkv_shards` says so to the
#   operator, which compares it with the mesh; x as a tuple (q, k, v) would need no order at all.
# - A slot of a paged cache is a row number counted through all blocks. `local_slots` turns it into
#   the row number within this device's blocks, or into -1, which writes nothing, where the row is
#   another device's.
# - Where the tokens are split over the axis that splits the blocks, a device does not have the
#   tokens whose rows are in its blocks: gather them first.

# %%
COLUMNS = ("x", "weight_scale", "bias")
PER_TOKEN = ("x", "cos", "sin", "indices")


def compiled_manual(layout):
    """The step of the whole mesh, from the step of one device; None without a short way."""
    todo = layout["shard_map"]
    if todo is None:
        return None
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (AxisType.Auto,) * 2)
    where = specs(layout, columns=todo["columns"])
    results = specs(layout, "results")

    def one_device(call):
        if "all_gather" in todo:
            for name in PER_TOKEN:
                call[name] = jax.lax.all_gather(call[name], todo["all_gather"], tiled=True)
        if "local_slots" in todo:
            rows = math.prod(call["k_cache"].shape[:2])
            call["indices"] = jax_kvcache.local_slots(call["indices"], rows, todo["local_slots"])
        result = operator(layout)(**call, qkv_shards=2)
        if "all_gather" in todo:  # of q, k and v keep the tokens that the device came with
            own = B // jax.lax.axis_size(todo["all_gather"])
            start = own * jax.lax.axis_index(todo["all_gather"])
            q, k, v = (jax.lax.dynamic_slice_in_dim(a, start, own) for a in result[:3])
            result = result._replace(q=q, k=k, v=v)
        return tuple(result)

    call = dict(call_of(layout))
    for name in COLUMNS:
        call[name] = jax_kvcache.interleave_qkv_for_tensor_parallel(call[name], SPLITS, 2)
    call = {
        name: jax.device_put(array, NamedSharding(mesh, where[name]))
        for name, array in call.items()
    }
    in_specs = {name: where[name] for name in call}
    whole = jax.shard_map(
        one_device, mesh=mesh, in_specs=(in_specs,), out_specs=tuple(results.values())
    )
    caches = {name: call.pop(name) for name in ("k_cache", "v_cache")}
    step = jax.jit(lambda caches, others: whole(caches | others), donate_argnums=0)
    compiled = step.lower(caches, call).compile()
    return compiled, (caches, call)


# %% [markdown]
# ## What moves
#
# A program that moves something has a collective operation, whose results are what each device
# then holds. The bytes below are the sizes of these results, and they equal what the table expects.


# %%
def received(compiled):
    """Bytes of the results of all collectives in a program."""
    total = 0
    for line in compiled.as_text().splitlines():
        found = re.search(r"= (.+?) (all-|collective-|reduce-scatter)[a-z-]*\(", line)
        for bits, shape in re.findall(r"[a-z](\d+)\[([\d,]*)\]", found[1] if found else ""):
            total += int(bits) // 8 * math.prod(int(size) for size in shape.split(",") if size)
    return total


def by_the_table(layout, mesh_shape=(2, 2)):
    """Bytes that each device receives in automatic and explicit mode."""
    devices, axes = dict(zip(("dp", "tp"), mesh_shape, strict=True)), layout["axes"]
    sizes = dict(
        T=B * S, T_here=B * S // devices[axes["tokens"]] if "tokens" in axes else B * S,
        H=H, Nkv_here=Nkv // devices[axes["heads"]] if "heads" in axes else Nkv, D=D,
    )  # fmt: skip
    moved = layout["receives"]
    if moved is None or devices[moved["over"]] == 1:
        return 0
    factors = [TABLE["bytes"][name] for name in moved["arrays"]]
    return sum(math.prod(sizes.get(f, f) for f in array) for array in factors)


def checked(layout, compiled, call, result):
    """Bytes received, when the result is right and the caches stayed in place."""
    for array, answer in zip(
        result, expected(layout["cache_mode"], layout["C1_over_B"] * B), strict=True
    ):
        assert (np.asarray(array) == answer).all()
    cache = call["k_cache"]
    assert cache.is_deleted()
    assert compiled.memory_analysis().temp_size_in_bytes < math.prod(
        cache.sharding.shard_shape(cache.shape)
    )
    return received(compiled)


lines = [f"{'layout':20} {'automatic':>10} {'explicit':>10} {'shard_map':>10}"]
for name, layout in LAYOUTS.items():
    moved = {}
    for kind, mode in ((AxisType.Auto, "automatic"), (AxisType.Explicit, "explicit")):
        compiled, call = compiled_whole(layout, kind)
        moved[mode] = checked(layout, compiled, call, compiled(**call))
        assert moved[mode] == by_the_table(layout)
    manual = compiled_manual(layout)
    if manual is None:
        moved["shard_map"] = "-"
    else:
        compiled, (caches, others) = manual
        moved["shard_map"] = checked(layout, compiled, caches, compiled(caches, others))
        assert (moved["shard_map"] > 0) == ("all_gather" in layout["shard_map"])
    lines.append(f"{name:20} " + " ".join(f"{size:>10}" for size in moved.values()))
print("bytes that each of the 2 x 2 devices receives in one call", *lines, sep="\n")

# %% [markdown]
# The dash stands for layouts that need more than these three steps under `jax.shard_map`. In words:
#
# - Nothing moves in any mode if every device has all tokens (`heads`, `blocks_heads`), or if each
#   sequence's tokens are on the devices that have its cache (`batch_heads`).
# - If the projection's columns are split, automatic and explicit mode gather `x`, because the plain
#   order [q | k | v] is not split into whole heads of q, k and v. Interleaved columns under
#   `jax.shard_map` avoid that.
# - If a token's row may be stored on a device that does not have the token (the last three),
#   automatic and explicit mode send int8 rows and slots to every device. They are smaller than the
#   int32 `x` that a program under `jax.shard_map` gathers.
#
# A layered `KVCache` that is sharded over B behaves like `more_blocks` in automatic and explicit
# mode, because its layers come before B: the int8 rows travel. Under `jax.shard_map` nothing does.
#
# ## Two ways to go wrong
#
# An interleaved `x` outside `jax.shard_map` gives wrong results: the operator sees the whole array
# there, and its columns have to be in the plain order. With `qkv_shards` it is an error.

# %%
layout = LAYOUTS["batch_heads"]
call = dict(call_of(layout))
for name in COLUMNS:
    call[name] = jax_kvcache.interleave_qkv_for_tensor_parallel(call[name], SPLITS, 2)
wrong = operator(layout)(**call)
right = expected(layout["cache_mode"], B)
print(f"equal codes of k: {(np.asarray(wrong.k_cache) == right[3])[right[3] != 0].mean():.0%}")
assert (np.asarray(wrong.k_cache) != right[3]).any()

# %% [markdown]
# A layout in which a cache would have to move is an error. In explicit mode it is raised while
# tracing; in automatic mode it is found when XLA partitions, and arrives inside XLA's error.

# %%
mesh = jax.make_mesh((2, 2), ("dp", "tp"), (AxisType.Explicit,) * 2)
call = {name: jax.device_put(array, NamedSharding(mesh, P())) for name, array in call.items()}
for name in ("k_cache", "v_cache"):
    call[name] = jax.device_put(call[name], NamedSharding(mesh, P(None, None, None, "tp")))
try:
    operator(layout)(**call)
except ValueError as error:
    print(f"ValueError: {error}")
else:
    raise AssertionError("a cache that is sharded over D was taken")

# %% [markdown]
# ## Exported programs, the compilation cache, several hosts
#
# `jax.export` takes programs in manual and in explicit mode. JAX's persistent compilation cache
# finds programs in automatic mode again only with
# `jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)`.
#
# On several hosts start one process per host, each with
#
# ```python
# jax.distributed.initialize("host0:1234", num_processes=2, process_id=i,
#                            heartbeat_timeout_seconds=10)
# mesh = jax.make_mesh((jax.device_count(),), ("dp",), (jax.sharding.AxisType.Auto,))
# step = jax.jit(jax.shard_map(forward, mesh=mesh, in_specs=..., out_specs=...), donate_argnums=2)
# ```
#
# `tests/programs/decode_over_processes.py` is a complete program, which splits heads or sequences
# over all devices; a test runs it as two processes. When one process dies, the others end with an
# error: that of a broken collective, or a missing heartbeat.
