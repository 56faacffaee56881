# %% [markdown]
# # How does a server use the cache?
#
# A server reads prompts of different lengths together, lets requests join and leave between steps,
# reads a common prefix once, takes back drafted tokens that turn out wrong, and spreads the heads
# over devices. Here is each of these on a paged cache and the small language model that comes with
# the package: one jitted step on the device, and a `BlockAllocator` on the host that knows which
# request has which blocks.
#
# Every text that the server writes is compared with the one that `alone` gives: the same model on a
# contiguous cache, with nobody else in the batch. A step has at most BATCH requests. The cache has
# BLOCKS blocks of BLOCK rows, of which a request can have COLUMNS.

# %%
import dataclasses
import functools
import itertools

import jax
import jax.export
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import PartitionSpec as P

from jax_kvcache import BlockAllocator, disabled_export_checks, numerics
from jax_kvcache.checkpoints import load_demo
from jax_kvcache.model import forward, new_cache, new_paged_cache
from jax_kvcache.model.calibrate import channels, observe_windows
from jax_kvcache.model.evaluate import cut_windows
from jax_kvcache.model.generate import generate

jax.config.update("jax_num_cpu_devices", 2)
BATCH, BLOCKS, BLOCK, COLUMNS = 4, 48, 8, 32


def alone(model, prompt, length):
    """The prompt and so many bytes more."""
    steps = generate(model, new_cache(model, 1), np.array(list(prompt)), temperature=0.0, seed=0)
    return prompt + bytes(int(step.token[0]) for step in itertools.islice(steps, length))


# %% [markdown]
# ## The step
#
# `positions` [B, S] says everything about a ragged batch: the position of each token in its own
# text, and -1 for padding, which writes nothing and sees nothing. A prompt, a single new token and
# a few drafted ones differ only in how many positions they have. Before the write, blocks that are
# shared are copied. The cache is donated, so both the copies and the writes are in place.
#
# `append_batch` makes these arrays: it gives each request the rows that its new tokens need.


# %%
@functools.partial(jax.jit, donate_argnames="cache")
def step(model, cache, tokens, batch):
    """The most likely byte after each of `tokens`, and the cache."""
    cache = cache.copy_blocks(batch.sources, batch.destinations)
    logits, cache = forward(model, tokens, cache, batch.positions, block_table=batch.block_table)
    return jnp.argmax(logits, -1).astype(jnp.uint8), cache


class Server:
    def __init__(self, model):
        self.model, self.cache = model, new_paged_cache(model, BLOCKS, BLOCK)
        self.allocator = BlockAllocator(BLOCKS, BLOCK)
        self.blocks = []  # of each step, those of each sequence

    def arrays(self, new):
        """The step's tokens and where they are, when each sequence has these new bytes."""
        counts = {sequence: len(text) for sequence, text in new.items()}
        batch = self.allocator.append_batch(counts, batch=BATCH, columns=COLUMNS)
        tokens = np.zeros_like(batch.positions)
        tokens[batch.positions >= 0] = list(b"".join(new.values()))
        return tokens, batch

    def read(self, new):
        """One step: of each sequence, the most likely byte after each new one, then padding."""
        following, self.cache = step(self.model, self.cache, *self.arrays(new))
        self.blocks.append({s: self.allocator.blocks(s) for s in self.allocator.sequences})
        return dict(zip(new, np.asarray(following), strict=False))


# %% [markdown]
# ## The engine
#
# A request is a prompt and how many bytes to add; a sequence `s` belongs to request `i`.
# What a request has to read is the part of its text that the allocator has no rows for: first the
# prompt, or what is left of it after a prefix that another sequence has read, then the last byte.
# `draft` may guess how the text goes on. The guess is read in the same step, and `truncate` takes
# back what the model would not have written; those rows are written again by what comes next.


# %%
def serve(server, requests, prefix=None, draft=lambda text: b""):
    """The text of each request (prompt, bytes to add); all begin with the sequence `prefix`."""
    allocator, texts = server.allocator, [prompt for prompt, _ in requests]
    ends = [len(prompt) + length for prompt, length in requests]
    waiting, running = [*range(len(requests))], {}
    while waiting or running:
        while waiting and len(running) < BATCH:  # join
            s = allocator.allocate() if prefix is None else allocator.fork(prefix)
            running[s] = waiting.pop(0)
        new = {s: (texts[i][allocator.length(s) :], draft(texts[i])) for s, i in running.items()}
        following = server.read({s: unread + guess for s, (unread, guess) in new.items()})
        for s, (unread, guess) in new.items():
            i, right = running[s], following[s][len(unread) - 1 :]
            kept = next((n for n, byte in enumerate(guess) if byte != right[n]), len(guess))
            allocator.truncate(s, len(texts[i]) + kept)
            texts[i] += bytes(right[: kept + 1])
            if len(texts[i]) >= ends[i]:  # leave
                allocator.free(s)
                del running[s]
    return [text[:end] for text, end in zip(texts, ends, strict=True)]


# %% [markdown]
# ## Ragged prompts; requests join and leave
#
# Six requests for four places. Whoever is done leaves its blocks to the next one, whose prompt is
# read in the same step in which the others read one byte each.

# %%
model = load_demo()
PROMPTS = [b"class Parser:\n    def ", b"import os\nimport ", b"for i in range(", b"def main(argv",
           b"try:\n    import numpy as np\nexcept ", b"    return self."]  # fmt: skip
REQUESTS = list(zip(PROMPTS, [40, 12, 30, 24, 33, 20], strict=True))
server = Server(model)
together = serve(server, REQUESTS)
assert together == [alone(model, *request) for request in REQUESTS]
assert server.allocator.num_free == BLOCKS
print(*(text.decode() for text in together[:3]), f"{len(server.blocks)} steps", sep="\n---\n")

_, axis = plt.subplots(figsize=(8, 3.2), dpi=75, layout="constrained")
for number, blocks_of in enumerate(server.blocks):
    for s, blocks in blocks_of.items():
        axis.scatter([number] * len(blocks), blocks, s=36, color=f"C{s}", marker="s")
axis.set(xlabel="step", ylabel="block of the cache", title="a colour for each request")
plt.show()

# %% [markdown]
# ## A shared prefix, with copy-on-write
#
# Three requests begin with the same text. It is read once; `fork` gives its blocks to each of them,
# and only the block in which they part is copied, on the device, when one of them writes.

# %%
PREFIX = b"import sys\n\n\ndef read_file(path):\n    with open"
REQUESTS_OF_PREFIX = [(PREFIX + end, 8) for end in (b"(", b"(path", b"_")]
server = Server(model)
prefix = server.allocator.allocate()
server.read({prefix: PREFIX})
texts = serve(server, REQUESTS_OF_PREFIX, prefix)
assert texts == [alone(model, *request) for request in REQUESTS_OF_PREFIX]
read_once = server.allocator.blocks(prefix)
shared = set.intersection(*map(set, server.blocks[-1].values()))
assert shared == set(read_once[:-1])  # the last one was not full
print(f"{len(shared)} of the prefix's {len(read_once)} blocks are shared")

# %% [markdown]
# ## Drafted tokens that are taken back
#
# Speculative decoding reads several guessed tokens in one step and keeps those that the model would
# have chosen. Here the guess is whatever followed the last three bytes where they stood before.


# %%
def what_followed_before(text):
    before = text[:-1].rfind(text[-3:])
    return text[before + 3 :][:7] if before >= 0 else b""


server = Server(model)
(text,) = serve(server, [(b"import os\nimport ", 60)], draft=what_followed_before)
assert text == alone(model, b"import os\nimport ", 60)
print(text.decode(), f"--- {len(server.blocks)} steps for 60 bytes", sep="\n")
assert len(server.blocks) < 60 / 2

# %% [markdown]
# ## Tensor parallelism
#
# The same step on two devices, each with half of the heads of the cache, half of the rows of the
# qkv projection and half of the columns of the output projection. In each layer XLA gathers what
# the first projection gave and sums what the second one gave; the codes of the cache stay where
# they are. The allocator does not notice: a block is half as wide on each device. (Inside
# `jax.shard_map` nothing has to be gathered: `sharding` shows that, and other layouts.)


# %%
def by_heads(path, _):
    """The PartitionSpec of a weight."""
    name = jax.tree_util.keystr(path)
    return P("tp") if ".qkv" in name else P(None, "tp") if ".o." in name else P()


server = Server(model)
cache_specs = jax.tree.map(lambda array: P(*[None] * (array.ndim - 2), "tp"), server.cache)
with jax.set_mesh(jax.make_mesh((2,), ("tp",), (jax.sharding.AxisType.Auto,))):
    server.cache = jax.device_put(server.cache, cache_specs)
    server.model = jax.device_put(model, jax.tree.map_with_path(by_heads, model))
assert serve(server, REQUESTS) == together
print({d.device.id: d.data.shape for d in server.cache.k_cache.addressable_shards})

# %% [markdown]
# ## Scales of one's own
#
# A model that has no scales yet reads texts without a cache, so that nothing is quantised, and
# observers see the k and v of every channel; padding they leave out. Here the texts are those that
# the server wrote.

# %%
observers = {name: numerics.Sketch.create(channels(model)) for name in "kv"}
for tokens, targets in zip(*cut_windows(together, model.config.context), strict=True):
    observers = observe_windows(model, observers, tokens, targets)
found = numerics.calibrate(observers, method="mse")
scales = {f"scale_{name}": found[name].scale for name in "kv"}
calibrated = dataclasses.replace(model, cache_params=scales)
own = serve(Server(calibrated), REQUESTS)
assert own == [alone(calibrated, *request) for request in REQUESTS]
print(f"{len({*own} & {*together})} of {len(own)} texts are those with the model's own scales")
assert own[0] == together[0]

# %% [markdown]
# ## Export
#
# The whole step as a file: `jax.export` writes the program, with the caches donated, and a process
# that has `jax_kvcache` installed runs it without the Python code above.

# %%
server = Server(calibrated)
arguments = server.arrays({server.allocator.allocate(): PROMPTS[0]})
step_of_model = jax.jit(functools.partial(step, calibrated), donate_argnums=0)
export = jax.export.export(step_of_model, disabled_checks=disabled_export_checks())
blob = export(server.cache, *arguments).serialize()

run = jax.jit(jax.export.deserialize(blob).call, donate_argnums=0)
following, cache = run(server.cache, *arguments)
assert following[0, len(PROMPTS[0]) - 1] == own[0][len(PROMPTS[0])]
print(f"{len(blob):,} bytes", cache, sep="\n")
assert server.cache.k_cache.is_deleted()
