# %% [markdown]
# # From qkv accumulators to a generated sentence
#
# `jax_kvcache` has one operator: it takes the int32 accumulators of a W8A8 qkv projection,
# dequantises them, rotates q and k (RoPE), quantises k and v to int8 per channel and writes them
# into the KV cache in place. Here it runs on the small language model that comes with the package.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jax_kvcache
from jax_kvcache.checkpoints import load_demo
from jax_kvcache.model import forward, new_cache

model = load_demo()
config = model.config
Nq, Nkv, D = config.n_q_heads, config.n_kv_heads, config.head_dim
print(f"{config.n_layers} layers, {Nq} query heads, {Nkv} key/value heads of {D}, bytes as tokens")

# %% [markdown]
# ## One layer by hand
#
# The activations are quantised per token, the weights per column; the matmul is int8 × int8 with
# int32 accumulators. These accumulators are what the operator takes.

# %%
prompt = b"class Parser:\n    def __init__(self"
tokens = jnp.asarray(np.frombuffer(prompt, np.uint8).astype(np.int32))[None, :]
layer = model.layers[0]
(qkv,) = layer.qkv  # one projection for q, k and v

h = model.embed[tokens]
h = h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + config.norm_eps) * layer.norm1
activation_scale = jnp.max(jnp.abs(h), -1) / 127
codes = jnp.rint(h / activation_scale[..., None]).astype(jnp.int8)
x = jax.lax.dot_general(
    codes, qkv.weight, (((2,), (1,)), ((), ())), preferred_element_type=jnp.int32
)
print("accumulators", x.dtype, x.shape, "from", int(x.min()), "to", int(x.max()))

# %% [markdown]
# The tables of RoPE, an empty cache of 256 rows, and the call. Batch b writes the rows from
# `indices[b]` on.

# %%
B, S, H = x.shape
positions = jnp.arange(S, dtype=jnp.int32)[None, :]
cos, sin = jax_kvcache.rope_tables(positions, D, config.rope.theta, jnp.bfloat16)
k_cache, v_cache = jnp.zeros((2, B, config.context, Nkv, D), jnp.int8)
scale_k, scale_v = model.cache_params["scale_k"][0], model.cache_params["scale_v"][0]

operator = functools.partial(
    jax_kvcache.dequant_rope_quant_kvcache,
    weight_scale=qkv.weight_scale,
    activation_scale=activation_scale,
    bias=qkv.bias,
    kv_output=True,
)
indices = jnp.zeros((B,), jnp.int32)
result = operator(x, cos, sin, k_cache, v_cache, indices, scale_k, scale_v)
for name, value in result._asdict().items():
    print(f"{name:8} {value.dtype} {value.shape}")

restored = result.k_cache[:, :S].astype(jnp.float32) * scale_k
error = np.asarray(jnp.abs(restored - result.k.astype(jnp.float32)) / scale_k)
inside = np.abs(np.asarray(result.k_cache[:, :S], np.int32)) < 127  # not saturated
print(f"largest error of a restored k: {error[inside].max():.2f} steps of its scale")
assert error[inside].max() < 0.5 + 127 * 2.0**-8  # half a step; k is rounded to bfloat16
assert not result.k_cache[:, S:].any()  # no other row was touched

# %% [markdown]
# ## jit and donation
#
# Inside `jax.jit` with both caches donated, the caches are updated in place: the results are the
# very buffers that went in.

# %%
step = jax.jit(operator, donate_argnames=("k_cache", "v_cache"))
k_cache, v_cache = jnp.array(k_cache), jnp.array(v_cache)
before = k_cache.unsafe_buffer_pointer(), v_cache.unsafe_buffer_pointer()
in_place = step(x, cos, sin, k_cache, v_cache, indices, scale_k, scale_v)
after = in_place.k_cache.unsafe_buffer_pointer(), in_place.v_cache.unsafe_buffer_pointer()
assert before == after
assert k_cache.is_deleted()  # donated: the old name no longer has a buffer
assert (in_place.k_cache == result.k_cache).all()

# %% [markdown]
# An index that is not a row of the cache writes nothing, wherever it points; it never wraps or
# clamps into somebody else's rows.

# %%
for index in (-1, config.context, 2**31 - 1):
    untouched = jnp.full((B, config.context, Nkv, D), 7, jnp.int8)
    written = step(x, cos, sin, untouched, untouched + 0, jnp.full((B,), index), scale_k, scale_v)
    assert (written.k_cache == 7).all()
    assert (written.v_cache == 7).all()
partly = step(
    x, cos, sin, jnp.zeros_like(in_place.k_cache), jnp.zeros_like(in_place.v_cache),
    jnp.full((B,), config.context - 3), scale_k, scale_v,
)  # fmt: skip
assert (partly.k_cache[:, -3:] == in_place.k_cache[:, :3]).all()  # what fits is written

# %% [markdown]
# A wrong call raises while tracing, before anything runs, with what was expected and what was got.
# Donated caches stay alive.

# %%
for wrong in (dict(scale_k=scale_k[:, :32]), dict(indices=indices.astype(jnp.float32))):
    arguments = dict(scale_k=scale_k, indices=indices) | wrong
    try:
        step(
            x, cos, sin, in_place.k_cache, in_place.v_cache, arguments["indices"],
            arguments["scale_k"], scale_v,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}")
    else:
        raise AssertionError("a wrong call went through")
assert not in_place.k_cache.is_deleted()

# %% [markdown]
# ## A sentence
#
# `KVCache` holds the codes of all layers in one array, with their scales; `forward` calls the
# operator in every layer and attends over the int8 rows as they lie. One jitted step per byte, the
# cache donated from each to the next.


# %%
@functools.partial(jax.jit, donate_argnames="cache")
def read(model, cache, tokens, positions):
    """The most likely next byte after `tokens` [B, S], and the cache."""
    logits, cache = forward(model, tokens, cache, positions)
    return jnp.argmax(logits[:, -1], -1).astype(jnp.int32), cache


def write(model, prompt, length):
    """Continues the prompt greedily."""
    text, cache = bytearray(prompt), new_cache(model, 1)
    tokens = jnp.asarray(np.frombuffer(prompt, np.uint8).astype(np.int32))[None, :]
    position = 0
    while len(text) < length:
        byte, cache = read(model, cache, tokens, jnp.full((1,), position, jnp.int32))
        position += tokens.shape[1]
        text.append(int(byte[0]))
        tokens = byte[:, None]
    return bytes(text), cache


text, cache = write(model, prompt, 150)
print(text.decode())
assert text.startswith(prompt)
assert b"self." in text[len(prompt) :]

# %% [markdown]
# The cache after that sentence: a row per byte. The codes of each channel use the range that its
# scale gives them; the rows that are not written yet are 0.

# %%
plt.rcParams.update({"figure.dpi": 75, "font.size": 11})
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
for axis, name, codes in ((axes[0], "K", cache.k_cache), (axes[1], "V", cache.v_cache)):
    image = axis.imshow(
        codes[1, 0, :170, 0],
        cmap="cividis", vmin=-128, vmax=127, aspect="auto", interpolation="nearest",
    )  # fmt: skip
    axis.set(title=f"{name} of layer 1, head 0", xlabel="channel")
axes[0].set_ylabel("row = position in the text")
figure.colorbar(image, ax=axes, label="int8 code")
plt.show()
rows = np.asarray(cache.k_cache[1, 0]).any((1, 2))
assert rows[: len(text) - 1].all()  # all bytes but the last one have been read
assert not rows[len(text) - 1 :].any()

# %% [markdown]
# ## vmap over decode steps
#
# A decode step written for one sequence becomes one for many with `jax.vmap`. The batching rule
# makes the mapped axis a group dimension of the same single call: no loop, no copy of the caches,
# still in place.


# %%
def one_step(k_cache, v_cache, x, cos, sin, index, activation_scale):
    """One token [1, H] of one sequence with a cache of its own, [1, C2, Nkv, D]."""
    return jax_kvcache.dequant_rope_quant_kvcache(
        x, cos, sin, k_cache, v_cache, index, scale_k, scale_v,
        weight_scale=qkv.weight_scale, activation_scale=activation_scale, bias=qkv.bias,
    )  # fmt: skip


many = 8  # the first eight bytes of the prompt, as eight sequences at eight positions
batch = (
    jnp.zeros((many, 1, 64, Nkv, D), jnp.int8),
    jnp.zeros((many, 1, 64, Nkv, D), jnp.int8),
    x[0, :many, None],
    cos[0, :many, 0][:, None],
    sin[0, :many, 0][:, None],
    jnp.arange(many, dtype=jnp.int32)[:, None],
    activation_scale[0, :many, None],
)
steps = jax.jit(jax.vmap(one_step), donate_argnums=(0, 1))
single = [one_step(*(a[i] for a in batch)) for i in range(many)]
lowered = steps.lower(*batch)
pointer = batch[0].unsafe_buffer_pointer()
mapped = steps(*batch)
assert mapped.k_cache.unsafe_buffer_pointer() == pointer
for i, alone in enumerate(single):
    assert (mapped.k_cache[i] == alone.k_cache).all()
    assert (mapped.q[i] == alone.q).all()
assert "while" not in lowered.as_text()

# %% [markdown]
# ## What ran, and what it saves

# %%
print(
    jax_kvcache.explain(
        x, cos, sin, result.k_cache, result.v_cache, indices, scale_k, scale_v,
        weight_scale=qkv.weight_scale, activation_scale=activation_scale, bias=qkv.bias,
    )
)  # fmt: skip
in_bfloat16 = 2 * (cache.k_cache.size + cache.v_cache.size)
print(f"cache: {cache.nbytes:,} bytes with its scales, {in_bfloat16:,} in bfloat16")
assert cache.nbytes < 0.52 * in_bfloat16

# %% [markdown]
# ## Time per token against context length
#
# One layer of a decode step, write and attention, in the shape of an 8 B model (32 query heads, 8
# key/value heads of 128), for four sequences. The int8 cache through the native kernels and through
# XLA, and `jax.nn.dot_product_attention` over caches of numbers. Each point is the fastest of some
# runs, since other programs may share the machine.

# %%
from time import perf_counter

SEQUENCES, Q_HEADS, KV_HEADS, HEAD = 4, 32, 8, 128
WIDTH = (Q_HEADS + 2 * KV_HEADS) * HEAD
LENGTHS = (512, 1024, 2048, 4096)
new_x = jax.random.normal(jax.random.key(0), (SEQUENCES, 1, WIDTH))


def int8_step(implementation):
    def step(cache, position):
        tables = jax_kvcache.rope_tables(position[:, None], HEAD, dtype=jnp.float32)
        q, cache = cache.update(new_x, *tables, position, implementation=implementation)
        out = jax_kvcache.decode_attention(
            q, cache, lengths=position + 1, implementation=implementation
        )
        return out, cache

    def empty(length):
        step_of_code = jnp.full((KV_HEADS, HEAD), 0.03)
        return jax_kvcache.KVCache.create(
            SEQUENCES, length, KV_HEADS, HEAD, scale_k=step_of_code, scale_v=step_of_code
        )

    return step, empty


def float_step(dtype):
    def step(cache, position):
        tables = jax_kvcache.rope_tables(position[:, None], HEAD, dtype=jnp.float32)
        heads = new_x.reshape(SEQUENCES, 1, -1, HEAD)
        low, high = jnp.split(heads[:, :, :-KV_HEADS], 2, axis=-1)
        turned = jnp.concatenate([-high, low], axis=-1)
        q, k = jnp.split(
            heads[:, :, :-KV_HEADS] * tables[0] + turned * tables[1], [Q_HEADS], axis=2
        )
        batch = jnp.arange(SEQUENCES)[:, None]
        new = (k, heads[:, :, -KV_HEADS:])
        cache = tuple(
            c.at[batch, position[:, None]].set(n.astype(dtype))
            for c, n in zip(cache, new, strict=True)
        )
        attend = jax.nn.dot_product_attention
        return attend(q.astype(dtype), *cache, key_value_seq_lengths=position + 1), cache

    def empty(length):
        return tuple(jnp.zeros((SEQUENCES, length, KV_HEADS, HEAD), dtype) for _ in "kv")

    return step, empty


def milliseconds(step, empty, length, runs=7):
    """The fastest of some steps at the end of a cache of so many rows."""
    step, cache, best = jax.jit(step, donate_argnums=0), empty(length), np.inf
    position = jnp.full((SEQUENCES,), length - 1, jnp.int32)
    for _ in range(runs):
        start = perf_counter()
        _, cache = jax.block_until_ready(step(cache, position))
        best = min(best, perf_counter() - start)
    return 1e3 * best


contestants = {
    "int8, native": int8_step("ffi"),
    "int8, XLA": int8_step("xla"),
    "bfloat16": float_step(jnp.bfloat16),
    "float32": float_step(jnp.float32),
}
times = {name: [milliseconds(*c, n) for n in LENGTHS] for name, c in contestants.items()}
_, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
colors = ("#D55E00", "#E69F00", "#0072B2", "#009E73")  # Okabe-Ito
for (name, values), color in zip(times.items(), colors, strict=True):
    axis.plot(LENGTHS, values, "o-", color=color, label=name)
axis.set(
    xscale="log",
    yscale="log",
    xlabel="rows in use of each sequence",
    ylabel="ms per layer and step",
)
axis.set_xticks(LENGTHS, LENGTHS)
axis.minorticks_off()
axis.legend()
plt.show()
for name, values in times.items():
    print(f"{name:13}", "".join(f"{value:9.2f}" for value in values))
