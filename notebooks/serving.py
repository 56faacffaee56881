# %% [markdown]
# # How does a server use the cache?
#
# A server reads prompts of different lengths together, lets requests join and leave between steps,
# reads a common prefix once, takes back drafted tokens that turn out wrong, and spreads the heads
# over devices. Here is each of these on a paged cache and the small language model that comes with
# the package: one jitted step on the device, and a `BlockAllocator` on the host that knows which
# request has which blocks.

# %%
import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_kvcache
from jax_kvcache import numerics
from jax_kvcache.checkpoints import load_demo

jax.config.update("jax_num_cpu_devices", 2)
model = load_demo()
config = model.config
L, Nq, Nkv, D = config.n_layers, config.n_q_heads, config.n_kv_heads, config.head_dim
BATCH, BLOCKS, BLOCK = 4, 48, 8  # requests in a step; blocks of the cache, and their rows
COLUMNS = config.context // BLOCK  # the most blocks that a request can have

# %% [markdown]
# ## The step
#
# `positions` [B, S] says everything about a ragged batch: the position of each token in its own
# text, and -1 for padding, which writes nothing and sees nothing. A prompt, a single new token and
# a few drafted ones differ only in how many positions they have. The cache is donated, so both the
# copies of blocks and the writes are in place.


# %%
def norm(x, gain):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + config.norm_eps) * gain


def forward(model, cache, tokens, positions, table, axis=None, own_rows_only=False):
    """Logits [B, S, vocab], the cache, and every layer's k and v [B, S, L, Nkv, D]."""
    cos, sin = jax_kvcache.rope_tables(positions, D, config.rope.theta, jnp.bfloat16)
    shards = None if axis is None else jax.lax.axis_size(axis)
    x, seen = model.embed[tokens], []
    for index, layer in enumerate(model.layers):
        accumulators = layer.qkv[0].project(norm(x, layer.norm1))  # int32, and their scales
        q, k, v, cache = cache.update(
            **accumulators._asdict(), cos=cos, sin=sin, positions=positions, block_table=table,
            layer=index, qkv_shards=shards, kv_output=True,
        )  # fmt: skip
        heads = jax_kvcache.decode_attention(
            q.astype(jnp.float32), cache, positions=positions, block_table=table, layer=index
        )
        if own_rows_only:  # before there are scales: attention over k and v as they are
            heads = jax.nn.dot_product_attention(q, k, v, is_causal=True).astype(jnp.float32)
        mixed = layer.o(heads.reshape(*tokens.shape, -1))
        x = x + (mixed if axis is None else jax.lax.psum(mixed, axis))
        h = norm(x, layer.norm2)
        x = x + layer.down(jax.nn.silu(layer.gate(h)) * layer.up(h))
        seen.append((k, v))
    k, v = (jnp.stack(arrays, axis=2) for arrays in zip(*seen, strict=True))
    return norm(x, model.norm_f) @ model.embed.T, cache, (k, v)


def step(model, cache, tokens, positions, table, copies, axis=None):
    """The most likely byte after each of `tokens`, and the cache."""
    cache = cache.copy_blocks(*copies.T)
    logits, cache, _ = forward(model, cache, tokens, positions, table, axis)
    return jnp.argmax(logits, -1).astype(jnp.int32), cache


# %% [markdown]
# ## The host's side
#
# Before a step the allocator gives each request the rows that its new tokens need. Its answer is
# the block table, and for a request that would write into a block it shares, the copy to make
# first: `(-1, -1)`, which `copy_blocks` skips, where there is none.


# %%
class Server:
    def __init__(self, model, scales, step=step):
        self.model, self.step = model, jax.jit(step, donate_argnums=1)
        self.cache = jax_kvcache.PagedKVCache.create(BLOCKS, BLOCK, Nkv, D, layers=L, **scales)
        self.allocator = jax_kvcache.BlockAllocator(BLOCKS, BLOCK)
        self.owners, self.steps = [], 0

    def arrays(self, new):
        """The step's arrays when each sequence has these new bytes."""
        S = 1 << (max(map(len, new.values())) - 1).bit_length()  # few shapes: few compilations
        tokens, positions = np.zeros((BATCH, S), np.int32), np.full((BATCH, S), -1, np.int32)
        copies = np.full((BATCH, 2), -1, np.int32)
        for row, (sequence, text) in enumerate(new.items()):
            start = self.allocator.length(sequence)
            copies[row] = self.allocator.append(sequence, len(text))
            tokens[row, : len(text)] = list(text)
            positions[row, : len(text)] = np.arange(start, start + len(text))
        batch = [*new, *[None] * (BATCH - len(new))]
        return tokens, positions, self.allocator.block_table(batch, COLUMNS), copies

    def read(self, new):
        """One step; returns the most likely byte after each new one, for each sequence."""
        following, self.cache = self.step(self.model, self.cache, *self.arrays(new))
        self.steps += 1
        self.owners.append(np.full(BLOCKS, np.nan))
        for sequence in self.allocator.sequences:
            self.owners[-1][list(self.allocator.blocks(sequence))] = sequence
        rows = zip(new.items(), np.asarray(following), strict=False)
        return {s: bytes(row[: len(text)].astype(np.uint8)) for (s, text), row in rows}


# %% [markdown]
# ## Ragged prompts; requests join and leave
#
# Six requests for four places. Whoever is done leaves its blocks to the next one, whose prompt is
# read in the same step in which the others read one byte each.


# %%
def serve(server, prompts, lengths):
    """Each prompt with a continuation of so many bytes."""
    queue, new, texts = list(range(len(prompts))), {}, {}
    numbers, done = {}, {}
    while queue or new:
        while queue and len(new) < BATCH:  # join
            sequence = server.allocator.allocate()
            numbers[sequence] = queue.pop(0)
            new[sequence] = texts[sequence] = prompts[numbers[sequence]]
        for sequence, following in server.read(new).items():
            new[sequence], texts[sequence] = following[-1:], texts[sequence] + following[-1:]
            number = numbers[sequence]
            if len(texts[sequence]) == len(prompts[number]) + lengths[number]:  # leave
                done[number] = texts[sequence]
                server.allocator.free(sequence)
                del new[sequence]
    return [done[number] for number in range(len(prompts))]


PROMPTS = [b"class Parser:\n    def ", b"import os\nimport ", b"for i in range(", b"def main(argv",
           b"try:\n    import numpy as np\nexcept ", b"    return self."]  # fmt: skip
LENGTHS = [40, 12, 30, 24, 33, 20]
server = Server(model, model.cache_params)
together = serve(server, PROMPTS, LENGTHS)
print(*(text.decode() for text in together[:3]), sep="\n---\n")
print(f"--- {server.steps} steps for {len(PROMPTS)} requests")
assert server.allocator.num_free == BLOCKS

single = Server(model, model.cache_params)
for prompt, length, text in zip(PROMPTS, LENGTHS, together, strict=True):
    assert serve(single, [prompt], [length]) == [text]  # what others do changes nothing

plt.rcParams.update({"figure.dpi": 75, "font.size": 11})
plt.figure(figsize=(8, 3.2), layout="constrained")
plt.imshow(np.array(server.owners).T, cmap="tab10", aspect="auto", interpolation="nearest")
plt.colorbar(label="request")
plt.xlabel("step")
plt.ylabel("block of the cache")
plt.show()

# %% [markdown]
# ## A shared prefix, with copy-on-write
#
# Three requests begin with the same text. It is read once; `fork` gives its blocks to the others,
# and only the block in which they part is copied, on the device, when the first of them writes.

# %%
PREFIX = b"import argparse\n\n\ndef main():\n    parser = argparse."
ENDS = [b"ArgumentParser(", b"Namespace()\n", b"HelpFormatter"]
server = Server(model, model.cache_params)
allocator = server.allocator
first = allocator.allocate()
server.read({first: PREFIX})
requests = [first, allocator.fork(first), allocator.fork(first)]
shared = allocator.blocks(first)
following = server.read(dict(zip(requests, ENDS, strict=True)))
kept = set.intersection(*(set(allocator.blocks(request)) for request in requests))
print(f"{BLOCKS - allocator.num_free} blocks; {len(kept)} of the prefix's {len(shared)} are shared")
assert kept == set(shared[:-1])  # the last one was not full
for request, end in zip(requests, ENDS, strict=True):
    alone = single.allocator.allocate()
    assert single.read({alone: PREFIX + end})[alone].endswith(following[request])
    single.allocator.free(alone)

# %% [markdown]
# ## Drafted tokens that are taken back
#
# Speculative decoding reads several guessed tokens in one step and keeps those that the model would
# have chosen. `truncate` takes the others back: their rows are written again by what comes next.
# Here the guess is whatever followed the last three bytes where they stood before.


# %%
def speculate(server, prompt, length):
    sequence, text, new, draft = server.allocator.allocate(), prompt, prompt, b""
    while len(text) < len(prompt) + length:
        following = server.read({sequence: new + draft})[sequence][len(new) - 1 :]
        right = next((i for i in range(len(draft)) if draft[i] != following[i]), len(draft))
        read = server.allocator.length(sequence)
        server.allocator.truncate(sequence, read - (len(draft) - right))
        text, new = text + following[: right + 1], following[right : right + 1]
        before = text[:-1].rfind(text[-3:])
        draft = text[before + 3 :][:7] if before >= 0 else b""
    server.allocator.free(sequence)
    return text[: len(prompt) + length]


server = Server(model, model.cache_params)
(plain,) = serve(server, PROMPTS[1:2], [60])
steps = server.steps
assert speculate(server, PROMPTS[1], 60) == plain
print(plain.decode(), f"--- {steps} steps, and {server.steps - steps} with drafts", sep="\n")
assert server.steps - steps < steps / 2

# %% [markdown]
# ## Tensor parallelism
#
# The same step on two devices, each with half of the heads: inside `jax.shard_map`, the columns of
# the qkv projection in the order that `interleave_qkv_for_tensor_parallel` gives them, and one sum
# per layer after the output projection. The allocator does not notice: a block is half as wide on
# each device.

# %%
interleave = functools.partial(
    jax_kvcache.interleave_qkv_for_tensor_parallel, size_splits=(Nq * D, Nkv * D, Nkv * D), shards=2
)


def split(layer):
    """A layer with its columns in order, and the PartitionSpecs of its arrays."""
    (qkv,) = layer.qkv
    weight = interleave(qkv.weight.T).T  # [H, d_model]: its rows are the columns of x
    ordered = type(qkv)(weight, interleave(qkv.weight_scale), interleave(qkv.bias))
    specs = dataclasses.replace(
        jax.tree.map(lambda _: P(), layer),
        qkv=(type(qkv)(P("tp"), P("tp"), P("tp")),),
        o=dataclasses.replace(layer.o, weight=P(None, "tp")),
    )
    return dataclasses.replace(layer, qkv=(ordered,)), specs


layers, layer_specs = zip(*map(split, model.layers), strict=True)
parallel = dataclasses.replace(model, layers=layers)
model_specs = dataclasses.replace(jax.tree.map(lambda _: P(), model), layers=layer_specs)
cache_specs = jax.tree.map(lambda a: P(*[None] * (a.ndim - 2), "tp"), server.cache)
mesh = jax.make_mesh((2,), ("tp",), (jax.sharding.AxisType.Auto,))
parallel_step = jax.shard_map(
    functools.partial(step, axis="tp"), mesh=mesh, out_specs=(P(), cache_specs),
    in_specs=(model_specs, cache_specs, P(), P(), P(), P()),
)  # fmt: skip
server = Server(parallel, model.cache_params, parallel_step)
server.cache = jax.tree.map(
    lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), server.cache, cache_specs
)
assert serve(server, PROMPTS, LENGTHS) == together
print({d.device.id: d.data.shape for d in server.cache.k_cache.addressable_shards})

# %% [markdown]
# ## Scales of one's own
#
# `update(kv_output=True)` also returns k and v as they were before they were quantised. While a
# prompt is read, attention can run over these, so the scales that the cache has meanwhile do not
# matter: here they are 1. The padding becomes NaN, which observers leave out.


# %%
@jax.jit
def observe(observers, cache, tokens, positions, table):
    _, _, kv = forward(model, cache, tokens, positions, table, own_rows_only=True)
    was_read = (positions >= 0)[:, :, None, None, None]
    k, v = (jnp.where(was_read, a, jnp.nan) for a in kv)
    return numerics.observe(observers, {"k": k, "v": v})


ones = jnp.ones((L, Nkv, D))
uncalibrated = Server(model, dict(scale_k=ones, scale_v=ones))
observers = {name: numerics.Sketch.create((L, Nkv, D)) for name in "kv"}
for texts in (together[:4], together[4:]):
    new = {uncalibrated.allocator.allocate(): text for text in texts}
    tokens, positions, table, _ = uncalibrated.arrays(new)
    observers = observe(observers, uncalibrated.cache, tokens, positions, table)
    for sequence in new:
        uncalibrated.allocator.free(sequence)
found = {name: numerics.calibrate(observers[name], method="mse") for name in "kv"}
scales = {f"scale_{name}": found[name].scale for name in "kv"}
own = serve(Server(model, scales), PROMPTS, LENGTHS)
same = sum(a == b for a, b in zip(b"".join(own), b"".join(together), strict=True))
print(f"{same} of {len(b''.join(own))} bytes are those with the scales that the model came with")
assert own[0] == together[0]

# %% [markdown]
# ## Export
#
# The whole step as a file: `jax.export` writes the program, with the caches donated, and a process
# that has `jax_kvcache` installed runs it without the Python code above.

# %%
server = Server(model, scales)
arguments = server.arrays({server.allocator.allocate(): PROMPTS[0]})
program = jax.export.export(
    jax.jit(functools.partial(step, model), donate_argnums=0),
    disabled_checks=jax_kvcache.disabled_export_checks(),
)(server.cache, *arguments)
blob = program.serialize()

run = jax.jit(jax.export.deserialize(blob).call, donate_argnums=0)
following, cache = run(server.cache, *arguments)
last = following[0, len(PROMPTS[0]) - 1]
print(f"{len(blob):,} bytes; the next byte is {bytes([int(last)])}", cache, sep="\n")
assert last == together[0][len(PROMPTS[0])]
assert server.cache.k_cache.is_deleted()
