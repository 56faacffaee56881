# %% [markdown]
# # What does the operator become in the compiler?
#
# One primitive lowers to one custom call on platforms that have a native target (CPU, Ascend) and
# to plain XLA operations elsewhere. This notebook reads the intermediate code: the call, the
# aliasing that keeps caches in place, what donation does, and what `vmap` and `shard_map` turn it
# into.

# %%
import functools
import re
import textwrap
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_kvcache

jax.config.update("jax_num_cpu_devices", 4)
B, Nq, Nkv, D, C2 = 4, 8, 2, 64, 128
H = (Nq + 2 * Nkv) * D


def arguments(B=B, C2=C2, Nkv=Nkv):
    """A decode step: one token for each of B sequences."""
    x = jax.random.randint(jax.random.key(0), (B, 1, (Nq + 2 * Nkv) * D), -1000, 1000)
    cos, sin = jax_kvcache.rope_tables(jnp.arange(B)[:, None], D, 10_000.0, jnp.bfloat16)
    k_cache, v_cache = (jnp.zeros((B, C2, Nkv, D), jnp.int8) for _ in "kv")
    scale = jnp.full((Nkv, D), 0.05)
    return dict(
        x=x, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache,
        indices=jnp.arange(B, dtype=jnp.int32), scale_k=scale, scale_v=scale,
        weight_scale=jnp.full((x.shape[-1],), 1e-3),
    )  # fmt: skip


donated = jax.jit(jax_kvcache.dequant_rope_quant_kvcache, donate_argnames=("k_cache", "v_cache"))
call = arguments()
print(jax_kvcache.explain(**call))

# %% [markdown]
# ## The custom call
#
# The same trace, lowered for CPU and for Ascend on a machine that need not have one. Absent
# optionals are empty arrays, so the call always has 13 operands and 5 results.

# %%
TARGET = "@dequant_rope_quant_kvcache("


def custom_calls(text):
    return [line.strip() for line in text.splitlines() if TARGET in line]


def show(line, width=98):
    """Without the buffers' layouts, which are all row-major."""
    line = re.sub(r"(operand|result)_layouts = \[.*?\](, |(?=\}))", "", line).replace(", }", "}")
    print(textwrap.fill(line, width, subsequent_indent="    "), end="\n\n")


lowered = {}
for platform in ("cpu", "ascend"):
    lowered[platform] = donated.trace(**call).lower(lowering_platforms=(platform,)).as_text()
    print(f"--- {platform}")
    for line in custom_calls(lowered[platform]):
        show(line)

for text in lowered.values():
    (line,) = custom_calls(text)
    operands, results = line.split(" : ")[-1].split(" -> ")
    assert operands.count("tensor<") == 13
    assert results.count("tensor<") == 5

# %% [markdown]
# The two differ in one thing: Ascend gets slots that were already checked and made flat over all
# sequences, since the vendor's operator checks no upper bound; the CPU kernel checks for itself.
#
# ## Aliasing
#
# `output_operand_aliases` says that results 3 and 4, the caches, are operands 3 and 4. The caches
# go in as the caller has them: not one operation reshapes, transposes or copies them on the way.

# %%
cache_type = f"tensor<{B}x{C2}x{Nkv}x{D}xi8>"
for platform, text in lowered.items():
    (line,) = custom_calls(text)
    for i in (3, 4):
        assert f"output_tuple_indices = [{i}], operand_index = {i}" in line
    touching = [line for line in text.splitlines() if cache_type in line and TARGET not in line]
    operations = {name for line in touching for name in re.findall(r"stablehlo\.\w+", line)}
    print(f"{platform}: other operations that touch a cache: {sorted(operations)}")
    assert operations <= {"stablehlo.return"}

# %% [markdown]
# ## Donation
#
# Aliasing inside the program is not enough: the buffers must be the program's to overwrite. Donated
# arguments carry `tf.aliasing_output` in StableHLO, and the compiled module's first line lists
# `input_output_alias`. Without donation XLA copies both caches before the call.

# %%
plain = jax.jit(jax_kvcache.dequant_rope_quant_kvcache)
compiled = {
    name: function.lower(**call).compile()
    for name, function in (("donated", donated), ("not donated", plain))
}
cache_bytes = B * C2 * Nkv * D
for name, program in compiled.items():
    header, *lines = program.as_text().splitlines()
    alias = re.search(r"input_output_alias=\{.*?\) \}|input_output_alias=\{[^=]*\}", header)
    copies = [line.strip() for line in lines if re.search(r"= s8\[4,128,2,64\].* copy\(", line)]
    memory = program.memory_analysis()
    print(f"--- {name}: {memory.alias_size_in_bytes:,} bytes aliased")
    print(alias[0] if alias else "no input_output_alias")
    for line in copies:
        show(line.split(", metadata")[0])
    if name == "donated":
        assert alias
        assert not copies
        assert memory.alias_size_in_bytes >= 2 * cache_bytes
    else:
        assert not alias
        assert memory.alias_size_in_bytes == 0
        assert len(copies) == 2  # one of each cache

# %% [markdown]
# What it means for a decode step: with donation the time does not depend on the cache's size.


# %%
def seconds_per_step(function, call, rounds=7, steps=5):
    """Median over rounds."""
    caches = {name: call.pop(name) for name in ("k_cache", "v_cache")}
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for _ in range(steps):
            result = function(**call, **caches)
            caches = dict(k_cache=result.k_cache, v_cache=result.v_cache)
        jax.block_until_ready(caches)
        times.append((time.perf_counter() - start) / steps)
    return np.median(times[1:])  # the first round compiles


rows = 2 ** np.arange(7, 18, 2)
bytes_of = np.array([2 * B * Nkv * D * r for r in rows])
times = {
    name: [seconds_per_step(function, arguments(C2=int(r))) for r in rows]
    for name, function in (("donated", donated), ("not donated", plain))
}
plt.rcParams.update({"figure.dpi": 80, "font.size": 11, "axes.grid": True, "grid.alpha": 0.3})
figure, axis = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
for (name, y), color, marker in zip(times.items(), ("#0072B2", "#D55E00"), "os", strict=True):
    axis.plot(bytes_of / 2**20, np.array(y) * 1e3, color=color, marker=marker, label=name)
axis.set_xscale("log", base=2)
axis.set_yscale("log")
axis.set(xlabel="size of both caches (MiB)", ylabel="time of one step (ms)")
axis.legend()
plt.show()
assert times["not donated"][-1] > 3 * times["donated"][-1]

# %% [markdown]
# ## vmap
#
# The batching rule puts the mapped axis in front of the group dimensions: the same single call with
# one dimension more. No loop over examples, no fold of the caches into another shape.


# %%
def one_sequence(x, cos, sin, k_cache, v_cache, index, scale, weight_scale):
    """One token of one sequence."""
    return jax_kvcache.dequant_rope_quant_kvcache(
        x, cos, sin, k_cache, v_cache, index, scale, scale, weight_scale=weight_scale
    )


mapped = jax.jit(
    jax.vmap(one_sequence, in_axes=(0, 0, 0, 0, 0, 0, None, None)), donate_argnums=(3, 4)
)
tokens = [call[name][:, None] for name in ("x", "cos", "sin", "k_cache", "v_cache", "indices")]
text = mapped.lower(*tokens, call["scale_k"], call["weight_scale"]).as_text()
(line,) = custom_calls(text)
show(line)
assert f"tensor<{B}x1x{C2}x{Nkv}x{D}xi8>" in line  # the mapped dimension, then the call's own
assert "stablehlo.while" not in text
expected = donated(**arguments())
result = mapped(*tokens, call["scale_k"], call["weight_scale"])
assert (result.k_cache[:, 0] == expected.k_cache).all()

# %% [markdown]
# ## shard_map
#
# Two devices for the batch and two for the heads. In manual mode each device calls the operator on
# its own part; `interleave_qkv_for_tensor_parallel` orders the projection's columns so that each
# part is a [q | k | v] of its own. The compiled program has the call on the shard's shape and no
# communication.

# %%
mesh = jax.make_mesh((2, 2), ("data", "heads"))
where = dict(
    x=P("data", None, "heads"), cos=P("data"), sin=P("data"),
    k_cache=P("data", None, "heads"), v_cache=P("data", None, "heads"), indices=P("data"),
    scale_k=P("heads"), scale_v=P("heads"), weight_scale=P("heads"),
)  # fmt: skip
call = arguments()
expected = donated(**arguments())
order = functools.partial(
    jax_kvcache.interleave_qkv_for_tensor_parallel,
    size_splits=(Nq * D, Nkv * D, Nkv * D), shards=2,
)  # fmt: skip
call |= dict(x=order(call["x"]), weight_scale=order(call["weight_scale"]))
call = {name: jax.device_put(a, NamedSharding(mesh, where[name])) for name, a in call.items()}


CACHES = ("k_cache", "v_cache")


def pick(call):
    """The caches, to be donated, and the rest."""
    return {n: call[n] for n in CACHES}, {n: a for n, a in call.items() if n not in CACHES}


def per_device(caches, others):
    result = jax_kvcache.dequant_rope_quant_kvcache(**caches, **others, qkv_shards=2)
    return result.q, result.k_cache, result.v_cache


sharded = jax.jit(
    jax.shard_map(
        per_device, mesh=mesh, in_specs=pick(where),
        out_specs=(P("data", None, "heads"), where["k_cache"], where["v_cache"]),
    ),
    donate_argnums=0,
)  # fmt: skip
program = sharded.lower(*pick(call)).compile()
text = program.as_text()
(line,) = [line for line in text.splitlines() if 'custom_call_target="dequant_rope' in line]
show(line.strip().split(", metadata")[0])
assert f"s8[{B // 2},{C2},{Nkv // 2},{D}]" in line
collectives = re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text)
print("collectives:", collectives)
assert not collectives
assert program.memory_analysis().alias_size_in_bytes >= 2 * cache_bytes // 4
q, k_cache, v_cache = program(*pick(call))
assert (k_cache == expected.k_cache).all()
assert (q == expected.q).all()

# %% [markdown]
# ## Where there is no native target
#
# On a TPU the same call lowers to XLA operations; `explain` says what a platform would run.

# %%
text = donated.trace(**arguments()).lower(lowering_platforms=("tpu",)).as_text()
assert not custom_calls(text)
print(sorted(set(re.findall(r"stablehlo\.(?:scatter|divide|round_nearest_even|clamp)", text))))
assert "stablehlo.scatter" in text
