"""Seeded random calls of the operator: few shapes, so that compiling is shared, and many values."""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

BF16 = ml_dtypes.bfloat16
HEAD_SIZES = (16, 34, 48, 64, 80, 96, 112, 128, 176, 272, 512)
FLOATS = (np.float16, BF16, np.float32)
KINDS = ("plain", "ties", "saturation", "zeros", "subnormal", "nonfinite")


class Form(NamedTuple):
    """What a compiled function depends on: sizes, dtypes and options, no values."""

    B: int
    S: int | None
    Nq: int
    Nkv: int
    D: int
    C1: int
    C2: int
    x_dtype: Any
    dtype: Any  # of the tables
    cache_mode: str
    kv_output: bool
    offsets: bool
    activation_scale: bool
    bias_dtype: Any  # None: no bias

    @property
    def H(self):
        return (self.Nq + 2 * self.Nkv) * self.D

    @property
    def tokens(self):
        return (self.B,) if self.S is None else (self.B, self.S)

    @property
    def options(self):
        return {"cache_mode": self.cache_mode, "kv_output": self.kv_output}


def draw_form(rng) -> Form:
    pick = lambda *options: options[rng.integers(len(options))]  # noqa: E731
    B = int(rng.integers(1, 6))
    S = pick(None, 1, 2, 3)
    cache_mode = pick("contiguous", "page")
    C1 = B + int(rng.integers(0, 2)) * 2 if cache_mode == "contiguous" else int(rng.integers(1, 5))
    dtype = pick(*FLOATS)
    x_dtype = pick(np.int32, np.int32, dtype)
    is_accumulator = x_dtype is np.int32
    D = pick(*HEAD_SIZES)
    Nkv = pick(1, 2, 3, 8) if D <= 128 else pick(1, 2)
    return Form(
        B=B, S=S, Nq=pick(1, 2, 5) * (Nkv if D <= 64 else 1), Nkv=Nkv, D=D, C1=C1,
        C2=int(rng.integers(S or 1, 9)),
        x_dtype=x_dtype, dtype=dtype, cache_mode=cache_mode, kv_output=pick(False, True),
        offsets=pick(False, True), activation_scale=is_accumulator and pick(False, True),
        bias_dtype=pick(None, *FLOATS, np.int32) if is_accumulator else None,
    )  # fmt: skip


def _values(rng, shape, dtype, kind, magnitude=2.0):
    """Floats of a kind; no float32 or bfloat16 subnormals, which may be flushed."""
    x = rng.standard_normal(shape) * magnitude
    x[np.abs(x) < 1e-6] = 0.0
    if kind == "ties":
        x = np.round(x * 4) / 4
    elif kind == "saturation":
        x = x * 1000
    elif kind == "zeros":
        x = np.where(rng.random(shape) < 0.5, np.copysign(0.0, x), x)
    elif kind == "subnormal":  # of float16; normal in the other dtypes
        x = np.where(rng.random(shape) < 0.5, x * 2.0**-16, x)
    elif kind == "nonfinite":
        special = rng.choice([np.inf, -np.inf, np.nan], shape)
        x = np.where(rng.random(shape) < 0.1, special, x)
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def _indices(rng, form):
    """Every index used once, some of them out of range."""
    T = int(np.prod(form.tokens))
    if form.cache_mode == "page":
        slots = rng.permutation(np.arange(-4, max(form.C1 * form.C2, T) + 4))[:T]
        return slots.astype(np.int32)
    return rng.integers(-2, form.C2 + 2, form.B).astype(np.int32)


def draw_inputs(rng, form: Form) -> dict[str, Any]:
    kind = KINDS[rng.integers(len(KINDS))]
    heads, rows = (form.Nkv, form.D), (form.C1, form.C2, form.Nkv, form.D)
    tables = (*form.tokens, 1, form.D) if form.S else (form.B, form.D)
    ties = kind == "ties"

    def scale():
        size = 2.0 ** rng.integers(-4, 1, heads) if ties else rng.uniform(0.01, 0.1, heads)
        return size.astype(np.float32)

    inputs = {
        "cos": _values(rng, tables, form.dtype, kind, 0.7),
        "sin": _values(rng, tables, form.dtype, kind, 0.7),
        "k_cache": rng.integers(-128, 128, rows, np.int8),
        "v_cache": rng.integers(-128, 128, rows, np.int8),
        "indices": _indices(rng, form),
        "scale_k": scale(),
        "scale_v": scale(),
    }
    if form.x_dtype is np.int32:
        big = 2**31 if kind == "saturation" else 40_000
        inputs["x"] = rng.integers(-big, big, (*form.tokens, form.H)).astype(np.int32)
        weight = 2.0**-12 * np.ones(form.H) if ties else rng.uniform(1e-5, 1e-4, form.H)
        inputs["weight_scale"] = weight.astype(np.float32)
        if kind == "nonfinite":
            inputs["weight_scale"][rng.integers(form.H)] = np.inf
    else:
        inputs["x"] = _values(rng, (*form.tokens, form.H), form.x_dtype, kind)
    if form.offsets:
        for name in ("offset_k", "offset_v"):
            size = rng.uniform(-20, 20, heads)
            inputs[name] = (np.round(size * 2) / 2 if ties else size).astype(np.float32)
    if form.activation_scale:
        inputs["activation_scale"] = rng.uniform(0.5, 2.0, form.tokens).astype(np.float32)
    if form.bias_dtype is np.int32:
        inputs["bias"] = rng.integers(-5000, 5000, form.H).astype(np.int32)
        if kind == "saturation":
            inputs["bias"][:] = rng.choice([-(2**31), 2**31 - 1], form.H)
    elif form.bias_dtype is not None:
        inputs["bias"] = _values(rng, form.H, form.bias_dtype, kind)
    return inputs
