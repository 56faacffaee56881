"""A decoder over float weights in float64 NumPy: what derived checkpoint folders must give."""

import numpy as np
from support.internals import read_rope_parameters


def rms_norm(x, gain, eps):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * gain.astype(np.float64)


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rotate(x, cos, sin):
    """Turns the leading columns of each head of x [S, N, D], as many as twice cos has."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [first * cos - second * sin, first * sin + second * cos, rest]
    return np.concatenate(turned, axis=-1)


def logits(config, tensors, ids):
    """[S, vocab] float64.

    Args:
      config: config.json with `rope_parameters`.
      tensors: float weights and biases by name.
      ids: [S].
    """
    t = {name: a.astype(np.float64) for name, a in tensors.items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    eps, S = config["rms_norm_eps"], len(ids)
    window = config.get("sliding_window") if config["model_type"] == "mistral" else None
    rope = read_rope_parameters(config["rope_parameters"])
    frequencies, factor = rope.frequencies(head_dim)
    angles = np.arange(S)[:, None] * frequencies
    cos, sin = np.cos(angles) * factor, np.sin(angles) * factor
    ago = np.arange(S)[:, None] - np.arange(S)[None, :]
    seen = (ago >= 0) & (ago < (window or S))

    def linear(h, name):
        return h @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0)

    x = t["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        h = rms_norm(x, t[f"{p}input_layernorm.weight"], eps)
        q, k, v = (linear(h, f"{p}self_attn.{n}_proj").reshape(S, -1, head_dim) for n in "qkv")
        if f"{p}self_attn.q_norm.weight" in t:
            q = rms_norm(q, t[f"{p}self_attn.q_norm.weight"], eps)
            k = rms_norm(k, t[f"{p}self_attn.k_norm.weight"], eps)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = np.zeros_like(q)
        for j in range(heads):
            n = j // (heads // kv_heads)
            scores = np.where(seen, q[:, j] @ k[:, n].T * head_dim**-0.5, -np.inf)
            attended[:, j] = softmax(scores) @ v[:, n]
        x = x + linear(attended.reshape(S, -1), f"{p}self_attn.o_proj")
        h = rms_norm(x, t[f"{p}post_attention_layernorm.weight"], eps)
        gate = linear(h, f"{p}mlp.gate_proj")
        up = linear(h, f"{p}mlp.up_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * up, f"{p}mlp.down_proj")
    tied = config.get("tie_word_embeddings", False)
    head = t["model.embed_tokens.weight" if tied else "lm_head.weight"]
    return rms_norm(x, t["model.norm.weight"], eps) @ head.T
