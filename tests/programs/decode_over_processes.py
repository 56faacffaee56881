"""One of several processes that decode with the demo model over one mesh of all their devices.

  decode_over_processes.py COORDINATOR NUM_PROCESSES PROCESS heads|batch RESULT [DIES_AT_STEP]

On real hosts only the coordinator's address and the number of processes differ.
"""

import dataclasses
import functools
import os
import re
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_kvcache.checkpoints import load_demo
from jax_kvcache.model import forward, new_cache

TEXTS = (b"def read", b"import o", b"for i in", b"return s")
STEPS = 16


def by_heads(layer):
    """A layer's specs: each device has half of the heads, and half of the MLP's width.

    The sum over them after `o` and `down` is an all-reduce. The projection's rows stay in their
    plain order.
    """
    (qkv,) = layer.qkv
    rows, columns = P("tp"), P(None, "tp")
    return dataclasses.replace(
        layer,
        qkv=(dataclasses.replace(qkv, weight=rows, weight_scale=rows, bias=rows),),
        o=dataclasses.replace(layer.o, weight=columns),
        gate=dataclasses.replace(layer.gate, weight=rows),
        up=dataclasses.replace(layer.up, weight=rows),
        down=dataclasses.replace(layer.down, weight=columns),
    )


def place(mesh, tree, spec):
    """Puts host arrays that every process has on the mesh."""

    def put(value, spec):
        value = np.asarray(value)
        where = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(value.shape, where, lambda index: value[index])

    if isinstance(spec, P):
        spec = jax.tree.map(lambda _: spec, tree)
    return jax.tree.map(put, tree, spec)


def specs_of(cache, codes, params):
    """A cache's PartitionSpecs: `codes` for k and v, `params` for the scales."""
    return jax.tree.map(lambda leaf: codes if leaf.dtype == jnp.int8 else params, cache)


def build(layout, batch):
    """The model, the cache, the jitted step and where tokens lie, over all devices of all hosts."""
    model = load_demo()
    cache = new_cache(model, batch)
    if layout == "heads":
        # tp over the processes, so that the all-reduce is between hosts here
        devices = np.array(jax.devices()).reshape(jax.process_count(), -1).T
        mesh = jax.sharding.Mesh(devices, ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)
        specs = jax.tree.map(lambda _: P(), model)
        specs = dataclasses.replace(specs, layers=tuple(map(by_heads, specs.layers)))
        cache_specs, tokens = specs_of(cache, P(None, None, None, "tp"), P(None, "tp")), P()
        step = forward
    else:
        mesh = jax.make_mesh((jax.device_count(),), ("dp",), (AxisType.Auto,))
        specs = jax.tree.map(lambda _: P(), model)
        cache_specs, tokens = specs_of(cache, P(None, "dp"), P()), P("dp")
        step = jax.shard_map(
            forward,
            mesh=mesh,
            in_specs=(specs, tokens, cache_specs, tokens),
            out_specs=(tokens, cache_specs),
        )
    out = jax.tree.map(lambda spec: NamedSharding(mesh, spec), (P(), cache_specs))

    @functools.partial(jax.jit, donate_argnums=2, out_shardings=out)
    def choose(model, text, cache, positions):
        logits, cache = step(model, text, cache, positions)
        return jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32), cache

    put = functools.partial(place, mesh)
    return put(model, specs), put(cache, cache_specs), choose, lambda value: put(value, tokens)


def decode(layout, dies_at=None):
    """Reads the texts and writes on, a byte of each at a time; also what the step communicates."""
    texts = np.stack([np.frombuffer(text, np.uint8) for text in TEXTS]).astype(np.int32)
    model, cache, choose, put = build(layout, len(texts))
    positions = np.zeros(len(texts), np.int32)
    step = choose.lower(model, put(texts[:, :1]), cache, put(positions)).compile()
    for i in range(STEPS):
        if i == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        byte, cache = step(model, put(texts[:, i : i + 1]), cache, put(positions + i))
        if texts.shape[1] == i + 1:
            texts = np.concatenate([texts, np.asarray(byte)[:, None]], axis=1)
    return texts, re.findall(r"= (.*?) (all-[a-z]+|collective-[a-z]+)(?:-start)?\(", step.as_text())


if __name__ == "__main__":
    coordinator, processes, process, layout, result, *dies_at = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator,
        int(processes),
        int(process),
        initialization_timeout=60,
        heartbeat_timeout_seconds=10,  # a process that is gone is noticed within this
        shutdown_timeout_seconds=20,
    )
    texts, moved = decode(layout, int(dies_at[0]) if dies_at else None)
    np.savez(result, texts=texts, moved=moved)
