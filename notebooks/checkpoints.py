# %% [markdown]
# # From a float checkpoint to W8A8 with an int8 cache
#
# A model arrives as a folder of float weights. This notebook quantises its weights and activations
# (W8A8), finds scales for an int8 KV cache (C8), looks at what each step costs on text that the
# model was not calibrated on, and writes the result in the vendor's own format, AscendV1, which
# `vllm-ascend` reads too. Every claim is followed by an assertion.

# %%
import dataclasses
import json
import pathlib
import sysconfig
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from safetensors.numpy import save_file

from jax_kvcache import KVCache, checkpoints, numerics
from jax_kvcache.model import forward, forward_float, new_cache
from jax_kvcache.model.evaluate import cut_windows, nll_float_cache, nll_int8_cache
from jax_kvcache.model.linear import DynamicInt8Linear

work = pathlib.Path(tempfile.mkdtemp())

# %% [markdown]
# ## A float folder
#
# The model that comes with the package is quantised already. Its float form, written as Hugging
# Face lays models out, is where we start: config.json and one safetensors file.

# %%
demo = checkpoints.load_demo()
config = demo.config
(qkv,) = demo.layers[0].qkv
print("the demo's projection:", type(qkv).__name__, qkv.weight.dtype, qkv.weight.shape)

tensors = {"model.embed_tokens.weight": demo.embed, "model.norm.weight": demo.norm_f}
for i, layer in enumerate(demo.layers):
    (qkv,) = layer.qkv
    name, ends = f"model.layers.{i}", np.cumsum([config.n_q_heads, config.n_kv_heads])
    weight = qkv.weight * qkv.weight_scale[:, None]
    parts = [np.split(np.asarray(a), ends * config.head_dim) for a in (weight, qkv.bias)]
    for n, w, b in zip("qkv", *parts, strict=True):
        tensors[f"{name}.self_attn.{n}_proj.weight"] = w
        tensors[f"{name}.self_attn.{n}_proj.bias"] = b
    tensors[f"{name}.self_attn.o_proj.weight"] = layer.o.weight
    for n in ("gate", "up", "down"):
        tensors[f"{name}.mlp.{n}_proj.weight"] = getattr(layer, n).weight
    tensors[f"{name}.input_layernorm.weight"] = layer.norm1
    tensors[f"{name}.post_attention_layernorm.weight"] = layer.norm2

folder = work / "float"
folder.mkdir()
save_file({n: np.ascontiguousarray(a) for n, a in tensors.items()}, folder / "model.safetensors")
(folder / "config.json").write_text((checkpoints.demo_folder() / "config.json").read_text())

model = checkpoints.load(folder, progress=False)
print("loaded:", {leaf.dtype.name for leaf in jax.tree.leaves(model)}, "cache:", model.cache_params)
assert model.cache_params is None  # a float folder stays float, and so does its cache
assert not isinstance(model.layers[0].qkv[0], DynamicInt8Linear)

# %% [markdown]
# ## The text
#
# The source of Python's standard library: some modules to calibrate with, others to evaluate on.

# %%
stdlib = pathlib.Path(sysconfig.get_path("stdlib"))


def batches(modules, count):
    """[count, 16, 256] int32 tokens, which are bytes here, and how many of them to predict."""
    text = b"".join((stdlib / f"{module}.py").read_bytes() for module in modules)
    windows = cut_windows([text], config.context)
    return windows.tokens[:count], windows.targets[:count]


calibration, _ = batches(["argparse", "inspect", "typing"], 4)
held_out, targets = batches(["heapq", "textwrap", "shelve", "fileinput", "bisect", "sched"], 4)


def nll(measure, model):
    """Nats per byte of the held-out text."""
    sums = [measure(model, t, n).sum() for t, n in zip(held_out, targets, strict=True)]
    return float(sum(sums)) / targets.sum()


steps = {"float": nll(nll_float_cache, model)}

# %% [markdown]
# ## W8A8
#
# `load(folder, quantize="w8a8")` gives each row of a linear layer's weights its own scale, largest
# / 127, and quantises the activations of every token when it comes. The embedding, which is the
# output matrix too, stays float.

# %%
w8a8 = checkpoints.load(folder, "w8a8", progress=False)
assert isinstance(w8a8.layers[0].down, DynamicInt8Linear)


def linear_bytes(model):
    return sum(leaf.nbytes for leaf in jax.tree.leaves([m for m in model.layers]))


print(f"layers: {linear_bytes(model):,} bytes in float32, {linear_bytes(w8a8):,} in W8A8")
assert linear_bytes(w8a8) < 0.27 * linear_bytes(model)
steps["W8A8"] = nll(nll_float_cache, w8a8)

# %% [markdown]
# ## C8: scales for the cache
#
# Observers see K (after RoPE) and V of the calibration text; `calibrate` makes one scale per
# channel of them. `python -m jax_kvcache calibrate --model FOLDER` does the same.

# %%
observers = {n: numerics.MinMax.create((config.n_layers, config.n_kv_heads, config.head_dim))
             for n in "kv"}  # fmt: skip
read = jax.jit(forward_float)
for tokens in calibration:
    seen = read(w8a8, jnp.asarray(tokens))
    by_token = {"k": jnp.moveaxis(seen.k, 0, 2), "v": jnp.moveaxis(seen.v, 0, 2)}
    observers = numerics.observe(observers, by_token)
scales = {f"scale_{n}": c.scale for n, c in numerics.calibrate(observers).items()}
calibrated = dataclasses.replace(w8a8, cache_params=scales)
cache, float_cache = new_cache(calibrated, 1), new_cache(w8a8, 1)
print(f"one text's cache: {float_cache.nbytes:,} bytes in float32, {cache.nbytes:,} in int8")
assert isinstance(cache, KVCache)
steps["W8A8 + C8"] = nll(nll_int8_cache, calibrated)

# %% [markdown]
# ## What each step costs

# %%
for name, value in steps.items():
    print(f"{name:12} {value:.4f} nats per byte ({100 * (value / steps['float'] - 1):+.2f} %)")
assert abs(steps["W8A8"] / steps["float"] - 1) < 0.01
assert abs(steps["W8A8 + C8"] / steps["W8A8"] - 1) < 0.005

figure, axis = plt.subplots(figsize=(6, 3), dpi=80, layout="constrained")
axis.bar(list(steps), [100 * (v / steps["float"] - 1) for v in steps.values()], color="#0072B2")
axis.set_ylabel("nll above float's, %")
axis.axhline(0, color="black", lw=0.8)
plt.show()

# %% [markdown]
# ## Without calibration text
#
# `KVCache.calibrated` makes the scales from a first prompt, with a margin, and returns a cache
# that already holds it. `rows` makes the prompt's RoPE that of the cache, for the types that depend
# on the longest text. It says what the codes lose of the prompt; `saturation` says whether later
# tokens still fit.

# %%
prompt = 32
tokens, start = jnp.asarray(held_out[0]), jnp.zeros(16, jnp.int32)
first = jax.jit(forward_float, static_argnames="rows")(
    w8a8, tokens[:, :prompt], rows=config.context
)
cache, cost = KVCache.calibrated(first.k, first.v, config.context)
print("relative error of K per layer:", np.round(np.asarray(cost.error_k), 4))
assert float(cost.error_k.max()) < 0.02


@jax.jit
def rest_nll(model, cache):
    """Nats per byte of what follows the prompt, and the cache."""
    logits, cache = forward(model, tokens[:, prompt:], cache, start + prompt)
    log_p = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(log_p, tokens[:, prompt + 1 :, None], axis=2).mean(), cache


from_prompt, cache = rest_nll(calibrated, cache)
_, own = jax.jit(forward)(calibrated, tokens[:, :prompt], new_cache(calibrated, 16), start)
from_text, _ = rest_nll(calibrated, own)
saturation = cache.saturation(jnp.full(16, config.context, jnp.int32))
print(f"scales of the prompt: {from_prompt:.4f}, of the calibration text: {from_text:.4f}")
print("share of codes at an end:", np.round(np.asarray(saturation.k), 5))
assert abs(float(from_prompt / from_text) - 1) < 0.005
assert float(saturation.k.max()) < 0.01

# %% [markdown]
# ## The vendor's format
#
# `save` writes AscendV1: W8A8_DYNAMIC layers, C8 scales, and the description that names each
# tensor's type. `load` reads it back to the same logits.

# %%
saved = work / "ascend_v1"
checkpoints.save(calibrated, saved)
description = json.loads((saved / "quant_model_description.json").read_text())
for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.kv_cache_scale"):
    print(name, description[name])
again = checkpoints.load(saved, progress=False)
for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(calibrated), strict=True):
    np.testing.assert_array_equal(a, b)

# %% [markdown]
# The scales alone go into other formats too. A format that cannot hold them says so; `reduce`
# is the explicit loss.

# %%
checkpoints.write_kv_scales(work / "scales.json", scales, "onnxruntime")
read_back = checkpoints.read_kv_scales(work / "scales.json", num_kv_heads=config.n_kv_heads)
np.testing.assert_array_equal(read_back["scale_k"], scales["scale_k"])
try:
    checkpoints.write_kv_scales(work / "compressed", scales, "compressed_tensors")
except ValueError as error:
    print(error)
else:
    raise AssertionError("one scale per channel went into one per head")
checkpoints.write_kv_scales(work / "compressed", scales, "compressed_tensors", reduce="max")
by_head = dataclasses.replace(
    w8a8,
    cache_params={
        n: jnp.asarray(a) for n, a in checkpoints.read_kv_scales(work / "compressed").items()
    },
)
steps["one scale per head"] = nll(nll_int8_cache, by_head)
print(f"one scale per head: {steps['one scale per head']:.4f} nats per byte")
assert abs(steps["one scale per head"] / steps["W8A8 + C8"] - 1) < 0.02
