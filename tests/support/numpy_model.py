"""The demo model in NumPy, from its file: what the package's forward pass is tested against."""

import importlib.resources
import json

import ml_dtypes
import numpy as np
from support import oracle

PATH = importlib.resources.files("jax_kvcache").joinpath("data/pylm.npz")


def load():
    with PATH.open("rb") as file, np.load(file) as data:
        weights = dict(data)
    return weights, json.loads(str(weights["config"]))


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rms_norm(x, gain, eps):
    return (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * gain).astype(np.float32)


def logits(text, *, int8_cache):
    """[S, 256] logits of the byte after each byte of one text, positions from 0."""
    w, c = load()
    S, Nq, Nkv, D = len(text), c["n_q_heads"], c["n_kv_heads"], c["head_dim"]
    angles = np.arange(S)[:, None] * c["rope_theta"] ** -(np.tile(np.arange(D // 2), 2) * 2 / D)
    cos, sin = (f(angles).astype(ml_dtypes.bfloat16).reshape(1, S, 1, D) for f in (np.cos, np.sin))
    x = w["embed"].astype(np.float32)[np.frombuffer(text, np.uint8)]
    for i in range(c["n_layers"]):
        p = {key.removeprefix(f"layers.{i}."): a for key, a in w.items() if f"layers.{i}." in key}
        h = rms_norm(x, p["norm1"], c["norm_eps"])
        scale = (np.abs(h).max(axis=1) / np.float32(127)).astype(np.float32)
        codes = np.rint(h / scale[:, None]).astype(np.int32)
        empty = np.zeros((1, S, Nkv, D), np.int8)
        q, k, v, k_cache, v_cache = oracle.dequant_rope_quant_kvcache(
            codes[None] @ p["wqkv"].astype(np.int32), cos, sin, empty, empty,
            np.zeros(1, np.int32), p["scale_k"], p["scale_v"], weight_scale=p["wqkv_scale"],
            activation_scale=scale[None], bias=p["bqkv"], kv_output=True,
        )  # fmt: skip
        if int8_cache:
            k, v = k_cache * p["scale_k"], v_cache * p["scale_v"]
        q, k, v = (a[0].astype(np.float64) for a in (q, k, v))
        attended = np.zeros((S, Nq, D))
        for j in range(Nq):
            n = j // (Nq // Nkv)
            scores = np.where(np.tri(S, dtype=bool), q[:, j] @ k[:, n].T * D**-0.5, -np.inf)
            attended[:, j] = softmax(scores) @ v[:, n]

        def times(a, name, p=p):
            return a @ (p[name] * p[f"{name}_scale"])

        x = x + times(attended.reshape(S, -1), "wo")
        h = rms_norm(x, p["norm2"], c["norm_eps"])
        gate = times(h, "wgate")
        x = x + times(gate / (1 + np.exp(-gate)) * times(h, "wup"), "wdown")
    return rms_norm(x, w["norm_f"], c["norm_eps"]) @ w["embed"].astype(np.float32).T


def nll(text, *, int8_cache):
    """Mean negative log-likelihood of a text of one window, in nats per byte."""
    p = softmax(logits(text, int8_cache=int8_cache)[:-1])
    return -np.log(p[np.arange(len(text) - 1), np.frombuffer(text[1:], np.uint8)]).mean()
