# %% [markdown]
# # What does an int8 KV cache cost, and which scales make it cheap?
#
# The operator quantises K (after RoPE) and V to int8 with one static scale per channel:
# `code = clip(rint(value / scale + offset), -128, 127)`. This notebook looks at the values of a real
# model, calibrates in several ways, and measures what each way and each number format loses, from
# single channels up to the model's predictions. Every claim is followed by an assertion.

# %%
import pathlib
import sysconfig

import jax
import matplotlib.pyplot as plt
import numpy as np

from jax_kvcache import numerics
from jax_kvcache.model import load_model
from jax_kvcache.model.evaluate import cut_windows
from jax_kvcache.numerics import demo_model

plt.rcParams.update({"figure.dpi": 80, "font.size": 11, "axes.grid": True, "grid.alpha": 0.3})
BLUE, ORANGE, GREEN, VERMILION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"

model = load_model()
config = model.config
print(
    f"{config.n_layers} layers, {config.n_kv_heads} kv heads of {config.head_dim} channels, "
    f"windows of {config.context} bytes"
)

# %% [markdown]
# The text is the source of Python's standard library: three modules to calibrate with, others to
# evaluate on.

# %%
BATCH = 16


def full_windows(modules, count):
    """[N, 16, 256] int32: the first `count` windows of 256 bytes of these modules."""
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    text = b"".join((folder / f"{module}.py").read_bytes() for module in modules)
    windows = cut_windows([text], config.context)
    assert (windows.targets[: count // BATCH] == config.context - 1).all()
    return windows.tokens[: count // BATCH]


calibration_text = full_windows(["argparse", "inspect", "typing"], 128)
held_out = full_windows(["heapq", "textwrap", "shelve", "fileinput", "bisect", "sched"], 128)
print(f"calibration {calibration_text.size:,} bytes, evaluation {held_out.size:,} bytes")
assert held_out.size >= 30_000

# %% [markdown]
# ## 1. Calibrate, streaming
#
# An observer is a pytree that keeps a little of what it has seen. The `Sketch` keeps the range and a
# histogram with buckets of constant relative width (7.5 KiB per channel), so one pass serves every
# method; the activations themselves are gone after each batch.

# %%
channels = demo_model.channels(model)  # [layers, kv heads, head size]
observers = {name: numerics.Sketch.create(channels) for name in "kv"}
everything = np.full((BATCH,), config.context - 1, np.int32)
for tokens in calibration_text:
    observers = demo_model.observe_windows(model, observers, tokens, everything)

METHODS = {
    "absmax": dict(method="absmax"),
    "percentile 99.99": dict(method="percentile", percentile=99.99),
    "percentile 99.9": dict(method="percentile", percentile=99.9),
    "mse": dict(method="mse"),
    "minmax, asymmetric": dict(method="minmax", symmetric=False),
    "mse, asymmetric": dict(method="mse", symmetric=False),
}
calibrations = {name: numerics.calibrate(observers, **how) for name, how in METHODS.items()}
absmax = calibrations["absmax"]

# Two hosts that saw half of the text each agree, to the bit, with one that saw it all.
halves = [{name: numerics.Sketch.create(channels) for name in "kv"} for _ in range(2)]
for i, tokens in enumerate(calibration_text[:4]):
    halves[i % 2] = demo_model.observe_windows(model, halves[i % 2], tokens, everything)
union = {name: numerics.Sketch.create(channels) for name in "kv"}
for tokens in calibration_text[:4]:
    union = demo_model.observe_windows(model, union, tokens, everything)
merged = numerics.merge(*halves)
assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), merged, union)))

# %% [markdown]
# ## 2. The channels of K before and after RoPE, and of V
#
# RoPE rotates the pair of channels (j, j + 32) by an angle of position × 10000^(-j/32). Fast pairs
# (small j) turn through every angle, which smears a constant component over both signs; slow pairs
# hardly turn within 256 positions and keep it.

# %%
kv = jax.jit(demo_model.keys_and_values)(model, held_out[0])
k_after, v = (np.asarray(kv[name], np.float32) for name in "kv")  # [B, S, L, Nkv, D]
half = config.head_dim // 2
frequency = config.rope_theta ** -(np.arange(half) / half)
angle = np.arange(config.context)[:, None] * frequency  # [S, half]
cos, sin = (f(angle)[None, :, None, None, :] for f in (np.cos, np.sin))
first, second = k_after[..., :half], k_after[..., half:]
k_before = np.concatenate([first * cos + second * sin, second * cos - first * sin], -1)

LAYER, HEAD = 1, 1
figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained", sharey=False)
for axis, values, title, color in (
    (axes[0], k_before, "K before RoPE", ORANGE),
    (axes[1], k_after, "K after RoPE", BLUE),
    (axes[2], v, "V", GREEN),
):
    rows = values[:, :, LAYER, HEAD].reshape(-1, config.head_dim)
    low, q1, middle, q3, high = np.percentile(rows, [0, 5, 50, 95, 100], axis=0)
    x = np.arange(config.head_dim)
    axis.fill_between(x, low, high, step="mid", color=color, alpha=0.35, label="all values")
    axis.fill_between(x, q1, q3, step="mid", color=color, alpha=0.8, label="5 % to 95 %")
    axis.step(x, middle, "k", where="mid", lw=1, label="median")
    axis.set(title=f"{title} (layer {LAYER}, head {HEAD})", xlabel="channel", ylabel="value")
    axis.legend(fontsize=8, loc="upper left")
axes[1].sharey(axes[0])
plt.show()


def bias(values):
    """|mean| / standard deviation per channel, [L, Nkv, D]."""
    return np.abs(values.mean((0, 1))) / values.std((0, 1))


fast = [*range(8), *range(half, half + 8)]  # the eight fastest pairs
slow = [*range(half - 8, half), *range(2 * half - 8, 2 * half)]
for name, values in (("K before RoPE", k_before), ("K after RoPE", k_after), ("V", v)):
    b = bias(values)
    print(
        f"{name:14} |mean| / deviation, median: fast pairs {np.median(b[..., fast]):.2f}, "
        f"slow pairs {np.median(b[..., slow]):.2f}"
    )
# A rotation keeps the length of every pair ...
lengths = [np.hypot(a[..., :half], a[..., half:]) for a in (k_before, k_after)]
np.testing.assert_allclose(*lengths, rtol=1e-4, atol=1e-5)
# ... but takes the constant component out of the fast pairs.
assert np.median(bias(k_after)[..., fast]) < 0.5 * np.median(bias(k_before)[..., fast])
assert np.median(bias(k_after)[..., slow]) > 0.5 * np.median(bias(k_before)[..., slow])
