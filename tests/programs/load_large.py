"""Writes a float folder with random weights, then loads it in a fresh process and decodes.

  load_large.py FOLDER [SIZE]            SIZE: 1.5B (the default) or 60M parameters
  load_large.py --load FOLDER            the second half alone

Prints one line of JSON: parameters, bytes of the loaded model, the anonymous memory of the process
before loading and at its peak while loading (sampled; file pages are not anonymous), their growth
as a share of the model's bytes, and the seconds that loading and each decoded token took. The
first token also waits for the compiler.
"""

import json
import pathlib
import struct
import subprocess
import sys
import threading
import time

import ml_dtypes
import numpy as np

SIZES = {  # hidden, MLP, layers, q heads, kv heads, vocabulary: Qwen2.5-1.5B's, and a small one
    "1.5B": (1536, 8960, 28, 12, 2, 151936),
    "60M": (768, 3072, 4, 6, 2, 32000),
}
HEAD_DIM, SHARDS, TOKENS = 128, 3, 4
SAMPLES_PER_SECOND = 200


def shapes(hidden, mlp, layers, heads, kv_heads, vocab):
    """(name, shape) of every tensor of a Qwen2 model with tied embeddings."""
    yield "model.embed_tokens.weight", (vocab, hidden)
    yield "model.norm.weight", (hidden,)
    for i in range(layers):
        p = f"model.layers.{i}."
        for n, out in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            yield f"{p}self_attn.{n}_proj.weight", (out * HEAD_DIM, hidden)
            yield f"{p}self_attn.{n}_proj.bias", (out * HEAD_DIM,)
        yield f"{p}self_attn.o_proj.weight", (hidden, heads * HEAD_DIM)
        yield f"{p}mlp.gate_proj.weight", (mlp, hidden)
        yield f"{p}mlp.up_proj.weight", (mlp, hidden)
        yield f"{p}mlp.down_proj.weight", (hidden, mlp)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{p}{norm}.weight", (hidden,)


def write_shard(path, tensors, rng):
    """A safetensors file of random bfloat16 weights, one tensor in memory at a time."""
    header, end = {}, 0
    for name, shape in tensors:
        first, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors:
            values = rng.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)
            values = values + 1 if "norm" in name else values
            file.write(values.astype(ml_dtypes.bfloat16).tobytes())


def write(folder, size):
    """Writes the folder, in shards."""
    hidden, mlp, layers, heads, kv_heads, vocab = SIZES[size]
    folder.mkdir(parents=True)
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": HEAD_DIM,
        "vocab_size": vocab, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "tie_word_embeddings": True, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tensors, rng = list(shapes(*SIZES[size])), np.random.default_rng(0)
    index = {}
    for shard in range(SHARDS):
        part = tensors[shard::SHARDS]
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        write_shard(folder / name, part, rng)
        index |= {tensor: name for tensor, _ in part}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def anonymous_bytes():
    """RssAnon of this process."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("this system does not tell anonymous memory from file pages")


class Peak(threading.Thread):
    """Samples the anonymous memory until it is stopped."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes, self.stopped = anonymous_bytes(), threading.Event()

    def run(self):
        while not self.stopped.wait(1 / SAMPLES_PER_SECOND):
            self.bytes = max(self.bytes, anonymous_bytes())

    def stop(self):
        self.stopped.set()
        self.join()
        return max(self.bytes, anonymous_bytes())


def load(folder):
    """Loads, decodes greedily, and prints the line."""
    import jax
    import jax.numpy as jnp

    from jax_kvcache import checkpoints
    from jax_kvcache.model import new_cache
    from jax_kvcache.model.generate import generate

    jax.block_until_ready(jnp.ones(3) + 1)  # the backend is there before anything is measured
    before, peak = anonymous_bytes(), Peak()
    peak.start()
    start = time.perf_counter()
    model = jax.block_until_ready(checkpoints.load(folder))
    loading = time.perf_counter() - start
    most = peak.stop()
    leaves = jax.tree.leaves(model)
    size = sum(leaf.nbytes for leaf in leaves)
    written, seconds = [], []
    steps = generate(model, new_cache(model, 1, 64), np.array([1]), temperature=0.0, seed=0)
    for _ in range(TOKENS):
        start = time.perf_counter()
        written.append(int(next(steps).token[0]))
        seconds.append(round(time.perf_counter() - start, 3))
    report = {
        "parameters": sum(leaf.size for leaf in leaves),
        "model_bytes": size,
        "anonymous_before": before,
        "anonymous_peak": most,
        "growth": round((most - before) / size, 3),
        "seconds_to_load": round(loading, 1),
        "tokens": written,
        "seconds_per_token": seconds,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    if sys.argv[1] == "--load":
        load(sys.argv[2])
    else:
        folder, size = pathlib.Path(sys.argv[1]), (*sys.argv[2:], "1.5B")[0]
        write(folder, size)
        command = [sys.executable, "-P", __file__, "--load", str(folder)]
        sys.exit(subprocess.run(command, check=False).returncode)
