# %% [markdown]
# # Why do bits differ between implementations?
#
# Every step of the operator rounds once, to nearest even. An implementation that computes "the
# same formula" in another way gets other codes. Here are the ways in which that happens in
# practice, each run over real inputs, the demo model's first layer for every printable byte at 2048
# positions, and each shown on one input where it flips a code.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np

import jax_kvcache
from jax_kvcache.checkpoints import load_demo

model = load_demo()
config = model.config
Nq, Nkv, D = config.n_q_heads, config.n_kv_heads, config.head_dim
half, F16, F32 = D // 2, np.float16, np.float32
layer = model.layers[0]
(qkv,) = layer.qkv  # one projection for q, k and v
scale = np.asarray(model.cache_params["scale_k"][0])  # [Nkv, D]

# %% [markdown]
# The first layer's accumulators depend on the byte alone: 96 of them, each at 2048 positions, 128
# channels of K: 25 million codes.

# %%
printable = jnp.arange(32, 128)
h = model.embed[printable]
h = h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + config.norm_eps) * layer.norm1
activation_scale = jnp.max(jnp.abs(h), -1) / 127
accumulators = jax.lax.dot_general(
    jnp.rint(h / activation_scale[:, None]).astype(jnp.int8),
    qkv.weight,
    (((1,), (1,)), ((), ())),
    preferred_element_type=jnp.int32,
)  # [N, H]
N, S, CHUNK = len(printable), 2048, 512
tables = {
    dtype: jax_kvcache.rope_tables(jnp.arange(S)[None, :], D, config.rope.theta, dtype)
    for dtype in (jnp.float32, jnp.float16)
}  # [1, S, 1, D]


def operator(dtype, start, implementation="xla"):
    """K's codes [N, CHUNK, Nkv, D] from the operator, at positions start, start + 1 .."""
    cos, sin = (
        jnp.broadcast_to(t[:, start : start + CHUNK], (N, CHUNK, 1, D)) for t in tables[dtype]
    )
    shape = (N, CHUNK, Nkv, D)
    result = jax_kvcache.dequant_rope_quant_kvcache(
        jnp.repeat(accumulators[:, None], CHUNK, 1), cos, sin,
        jnp.zeros(shape, jnp.int8), jnp.zeros(shape, jnp.int8), jnp.zeros((N,), jnp.int32),
        jnp.asarray(scale), jnp.asarray(scale), weight_scale=qkv.weight_scale,
        activation_scale=jnp.repeat(activation_scale, CHUNK), bias=qkv.bias,
        implementation=implementation,
    )  # fmt: skip
    return np.asarray(result.k_cache)


codes, codes_float16 = (
    np.concatenate([operator(dtype, start) for start in range(0, S, CHUNK)], 1) for dtype in tables
)
print(f"{codes.size:,} codes")

# %% [markdown]
# ## The exact order, in NumPy
#
# NumPy rounds every operation once and fuses nothing. These few lines agree with the operator in
# every code, for float32 and for float16 tables.

# %%
ws, bias, activation = (np.asarray(a) for a in (qkv.weight_scale, qkv.bias, activation_scale))
y = np.asarray(accumulators).astype(F32) * ws * activation[:, None] + bias
k = y[:, Nq * D : (Nq + Nkv) * D].reshape(N, 1, Nkv, D)
cos, sin = (np.asarray(t) for t in tables[jnp.float32])


def rotate(k, cos, sin):
    first, second = k[..., :half], k[..., half:]
    return np.concatenate(
        [
            second * -sin[..., :half] + first * cos[..., :half],
            first * sin[..., half:] + second * cos[..., half:],
        ],
        -1,
    )


def quantize(value, scale=scale):
    return np.clip(np.rint(value.astype(F32) / scale), -128, 127).astype(np.int8)


rotated = rotate(k, cos, sin)
assert (quantize(rotated) == codes).all()

tables16 = [np.asarray(t) for t in tables[jnp.float16]]
rotated16 = rotate(k.astype(F16), *tables16)
assert rotated16.dtype == F16
assert (quantize(rotated16) == codes_float16).all()


# %% [markdown]
# A helper that counts the flipped codes, keeps the distance of each z from the nearest rounding
# boundary, and prints one input where a code flips.

# %%
flips, distances = {}, {}


def compare(name, other_z, exact_z, reference):
    """Both z [N, S, Nkv, D] float32: what is rounded to a code."""
    other = np.clip(np.rint(other_z), -128, 127).astype(np.int8)
    where = np.argwhere(other != reference)
    flips[name] = len(where)
    fraction = np.abs(exact_z.astype(np.float64)) % 1
    distances[name] = np.abs(fraction - 0.5)[tuple(where.T)]
    byte, position, head, d = where[len(where) // 2]
    at = byte, position, head, d
    per_million = len(where) / reference.size * 1e6
    print(f"{name}: {len(where):,} codes differ ({per_million:.1f} per million)")
    print(
        f"  byte {chr(printable[byte])!r}, position {position}, head {head}, channel {d}: "
        f"z = {float(exact_z[at])!r} -> {reference[at]}, "
        f"otherwise {float(other_z[at])!r} -> {other[at]}"
    )
    assert len(where) > 0
    return at


z = rotated / scale
z16 = rotated16.astype(F32) / scale

# %% [markdown]
# ## 1. Fused multiply-add
#
# `a*b + c*d` with one product inside an FMA keeps that product unrounded. XLA:CPU and GPU compilers
# do this unless prevented. (float64 holds a product of two float32 exactly: NumPy can imitate it.)

# %%
wide = [a.astype(np.float64) for a in (k, cos, sin)]


def fused(k64, cos64, sin64):
    first, second = k64[..., :half], k64[..., half:]
    product = lambda a, b: (a * b).astype(F32).astype(np.float64)  # noqa: E731 (rounded once)
    return np.concatenate(
        [
            second * -sin64[..., :half] + product(first, cos64[..., :half]),
            first * sin64[..., half:] + product(second, cos64[..., half:]),
        ],
        -1,
    ).astype(F32)


at = compare("fused multiply-add", fused(*wide) / scale, z, codes)
byte, position, head, d = at
pair = [float(k[byte, 0, head, j]) for j in (d % half, d % half + half)]
angle = [float(t[0, position, 0, d]) for t in (cos, sin)]
print(f"  pair {pair}, cos and sin {angle}, scale {float(scale[head, d])!r}")

# %% [markdown]
# ## 2. Multiplying by the reciprocal
#
# `value * (1 / scale)` rounds twice where `value / scale` rounds once. XLA rewrites a division by a
# broadcast value this way.

# %%
at = compare("reciprocal", rotated * (F32(1) / scale), z, codes)
value, step = rotated[at], scale[at[2:]]
print(f"  value {float(value)!r}, scale {float(step)!r}, 1/scale {float(F32(1) / step)!r}")
assert np.rint(value / step) != np.rint(value * (F32(1) / step))

# %% [markdown]
# ## 3. Double rounding
#
# With float16 tables each product and each sum is rounded to float16. Computing in float32 and
# rounding the result to float16 at the end is more accurate, and different. The other way round,
# with bfloat16 tables the operator quantises the unrounded float32 value; quantising the bfloat16
# result that it returns rounds twice.

# %%
once = rotate(k.astype(F16).astype(F32), *(t.astype(F32) for t in tables16)).astype(F16)
compare("float16 rounded at the end", once.astype(F32) / scale, z16, codes_float16)
twice = rotated.astype(ml_dtypes.bfloat16).astype(F32)
at = compare("quantising a rounded k", twice / scale, z, codes)
print(f"  k {float(rotated[at])!r}, rounded to bfloat16 {float(twice[at])!r}")

# %% [markdown]
# ## 4. Halves away from zero
#
# `rint` rounds halves to the even neighbour; C's `round` rounds them away from zero. It takes a z
# that is exactly a half. With calibrated scales that is rare; with scales that are powers of two,
# which some quantisers use, float16 values are coarse enough to reach it all the time.

# %%
power_of_two = np.exp2(np.ceil(np.log2(scale))).astype(F32)
exact = rotated16.astype(F32) / power_of_two
away = np.copysign(np.floor(np.abs(exact) + F32(0.5)), exact)
at = compare("halves away from zero", away, exact, quantize(rotated16, power_of_two))
print(f"  value {float(rotated16[at])!r}, scale {float(power_of_two[at[2:]])!r}")
assert abs(exact[at]) % 1 == 0.5

# %% [markdown]
# ## 5. What a compiler makes of the plain formula
#
# The formula written down in `jax.numpy` and compiled: on a CPU, XLA uses the reciprocal, and FMAs
# where it can. The reference in this package keeps it from doing so (a barrier on the divisor, a
# select on the products), and agrees with NumPy under `jit` in every code.


# %%
@jax.jit
def plain(k, cos, sin, scale):
    first, second = k[..., :half], k[..., half:]
    rotated = jnp.concatenate(
        [
            first * cos[..., :half] - second * sin[..., :half],
            first * sin[..., half:] + second * cos[..., half:],
        ],
        -1,
    )
    return rotated / scale


compare("plain jax.numpy under jit", np.asarray(plain(k, cos, sin, scale)), z, codes)
native = operator(jnp.float32, 0, implementation=None)  # what this platform runs by default
assert (native == codes[:, :CHUNK]).all()

# %% [markdown]
# ## How close it has to be
#
# A difference in the last bit of z flips a code only where z lies next to a half. Where it happens
# the codes differ by one step, never more: harmless to a model, fatal to a test that compares bits,
# to a cache that is shared between two implementations, and to finding real errors among them.

# %%
plt.rcParams.update({"figure.dpi": 80, "font.size": 11, "axes.grid": True, "grid.alpha": 0.3})
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.8), layout="constrained")
names = list(flips)[::-1]
per_million = [flips[name] / codes.size * 1e6 for name in names]
left.barh(names, per_million, color="#0072B2")
left.set_xscale("log")
left.set_xlabel("flipped codes per million")
for row, value in enumerate(per_million):
    left.text(value, row, f" {value:,.1f}", va="center", fontsize=9)
left.set_xlim(0.1, max(per_million) * 8)
left.grid(axis="y", visible=False)
left.set_axisbelow(True)
styles = {
    "fused multiply-add": ("#D55E00", "-"),
    "reciprocal": ("#0072B2", "--"),
    "quantising a rounded k": ("#009E73", "-."),
}
for name, (color, style) in styles.items():
    ordered = np.sort(distances[name])
    share = np.arange(1, len(ordered) + 1) / len(ordered)
    right.step(np.maximum(ordered, 1e-9), share, color=color, ls=style, label=name)
right.set_xscale("log")
right.set(
    xlabel="distance of z from the nearest half (codes)", ylabel="share of the flipped codes",
    xlim=(1e-8, 1),
)  # fmt: skip
right.legend(fontsize=9, loc="center left")
plt.show()

for name in ("fused multiply-add", "reciprocal"):
    assert distances[name].max() < 1e-4
assert flips["quantising a rounded k"] > 100 * flips["reciprocal"]
