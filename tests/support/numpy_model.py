"""The demo model in NumPy, from its folder: what the package's forward pass is tested against."""

import importlib.resources
import json
import struct

import numpy as np
from support import oracle

FOLDER = importlib.resources.files("jax_kvcache").joinpath("data/pylm")
DTYPES = {"F16": np.float16, "F32": np.float32, "I8": np.int8}
NAMES = {
    "wo": "self_attn.o_proj",
    "wgate": "mlp.gate_proj",
    "wup": "mlp.up_proj",
    "wdown": "mlp.down_proj",
}


def read_tensors():
    """The tensors of the folder's safetensors file, by the format's definition."""
    data = FOLDER.joinpath("quant_model_weights.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    tensors = {}
    for name, facts in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            first, end = (8 + size + offset for offset in facts["data_offsets"])
            values = np.frombuffer(data[first:end], DTYPES[facts["dtype"]])
            tensors[name] = values.reshape(facts["shape"])
    return tensors


def load():
    """The weights, [in, out], and the sizes."""
    t, c = read_tensors(), json.loads(FOLDER.joinpath("config.json").read_text())
    sizes = {
        "n_layers": c["num_hidden_layers"],
        "n_q_heads": c["num_attention_heads"],
        "n_kv_heads": c["num_key_value_heads"],
        "head_dim": c["head_dim"],
        "rope_theta": c["rope_parameters"]["rope_theta"],
        "norm_eps": c["rms_norm_eps"],
    }
    heads = sizes["n_kv_heads"], sizes["head_dim"]
    weights = {"embed": t["model.embed_tokens.weight"], "norm_f": t["model.norm.weight"]}
    for i in range(sizes["n_layers"]):
        p, w = f"model.layers.{i}.", f"layers.{i}."
        weights[f"{w}norm1"] = t[f"{p}input_layernorm.weight"]
        weights[f"{w}norm2"] = t[f"{p}post_attention_layernorm.weight"]
        qkv = [f"{p}self_attn.{n}_proj." for n in "qkv"]
        weights[f"{w}wqkv"] = np.concatenate([t[f"{n}weight"] for n in qkv]).T
        weights[f"{w}wqkv_scale"] = np.concatenate([t[f"{n}weight_scale"][:, 0] for n in qkv])
        weights[f"{w}bqkv"] = np.concatenate([t[f"{n}bias"] for n in qkv])
        for n, name in NAMES.items():
            weights[w + n] = t[f"{p}{name}.weight"].T
            weights[f"{w}{n}_scale"] = t[f"{p}{name}.weight_scale"][:, 0]
        for n in "kv":
            scale = t[f"{p}self_attn.{n}_proj.kv_cache_scale"]
            weights[f"{w}scale_{n}"] = scale.reshape(heads)
    return weights, sizes


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
    cos, sin = (f(angles).astype(np.float32).reshape(1, S, 1, D) for f in (np.cos, np.sin))
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
