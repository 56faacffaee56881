"""`python -m jax_kvcache bench` on an NVIDIA GPU: both operators beside XLA, cuDNN and a copy."""

import dataclasses
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_kvcache import backends
from jax_kvcache.backends.cuda import MAX_QUERIES
from jax_kvcache.caches import KVCache, PagedKVCache
from jax_kvcache.cli import CommandError
from jax_kvcache.cli.bench_cases import Case, make_caches, make_inputs
from jax_kvcache.cli.bench_steps import operator
from jax_kvcache.ops.decode_attention.api import decode_attention
from jax_kvcache.ops.dequant_rope_quant_kvcache.primitive import NAME

Nq, Nkv, D = 32, 8, 128
WRITES = {f"{tokens} tokens": tokens for tokens in (1, 32, 256, 4096, 16384)}
COPIED_BYTES = 1 << 30
CALLS = 20  # of a round


class Read(NamedTuple):
    """One shape of attention."""

    B: int
    rows: int
    block: int | None = None  # rows per block of a paged cache, or None
    S: int = 1  # queries of each sequence

    @property
    def bytes_moved(self) -> int:
        """Bytes of codes that one call must read."""
        return 2 * self.B * self.rows * Nkv * D


READS = {
    "1 x 2048": Read(1, 2048),
    "1 x 32768": Read(1, 32768),
    "8 x 4096": Read(8, 4096),
    "64 x 2048": Read(64, 2048),
    "1 x 32768 paged": Read(1, 32768, 16),
    "8 x 4096 paged": Read(8, 4096, 16),
    "64 x 2048 paged": Read(64, 2048, 16),
    "1 x 8192, S 512": Read(1, 8192, S=512),
    "1 x 8192, S 4096": Read(1, 8192, S=4096),
    "1 x 8192, S 8192": Read(1, 8192, S=8192),
}

# Of each name: what makes the state, the step, and its further arguments.
Steps = dict[str, tuple[Callable[[], Any], Callable, tuple[Any, ...]]]


def microseconds(step: Callable, state: Any, *arguments: Any, rounds: int) -> float:
    """The median time of one call, over rounds of calls that are enqueued without waiting."""
    for _ in range(3):
        state, _ = step(state, *arguments)
    jax.block_until_ready(state)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(CALLS):
            state, out = step(state, *arguments)
        jax.block_until_ready((state, out))
        times.append((time.perf_counter() - start) / CALLS)
    return 1e6 * statistics.median(times)


def kernel_nanoseconds(profile: jax.profiler.ProfileData) -> float:
    """The time that a profile's GPUs spent in kernels and copies."""
    return sum(
        event.duration_ns
        for plane in profile.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    )


def kernel_microseconds(step: Callable, state: Any, *arguments: Any) -> float:
    """The time of one call on the card, as the profiler sees it: without what the host takes."""
    state, _ = jax.block_until_ready(step(state, *arguments))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(CALLS):
                state, out = step(state, *arguments)
            jax.block_until_ready((state, out))
        [path] = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
        return kernel_nanoseconds(profile) / 1e3 / CALLS


def copy_bandwidth(rounds: int) -> float:
    """Bytes per second, read and written together, of a large elementwise operation."""
    array = jnp.zeros(COPIED_BYTES // 4, jnp.float32)
    step = jax.jit(lambda a: (a + 1, ()), donate_argnums=0)
    return 2 * COPIED_BYTES / (microseconds(step, array, rounds=rounds) * 1e-6)


def _time(steps: Steps, bytes_moved: int, rounds: int) -> dict[str, Any]:
    """Microseconds of each step: of a call, and of its kernels alone."""
    wall, kernel = {}, {}
    for name, (make_state, step, arguments) in steps.items():
        wall[name] = microseconds(step, make_state(), *arguments, rounds=rounds)
        kernel[name] = kernel_microseconds(step, make_state(), *arguments)
    return {"call": wall, "kernels": kernel, "bytes": bytes_moved}


def _write_steps(tokens: int) -> tuple[Steps, int]:
    case = Case(tokens, 1, Nq, Nkv, D, "page", max(tokens, 128), 16)
    inputs = make_inputs(case, 0)

    def step(caches, inputs, implementation):
        outputs, caches = operator(caches, inputs, cache_mode="page", implementation=implementation)
        return caches, outputs

    def steps(name):
        jitted = jax.jit(functools.partial(step, implementation=name), donate_argnums=0)
        return functools.partial(make_caches, case), jitted, (inputs,)

    return {"native": steps("ffi"), "xla": steps("xla")}, case.bytes_moved


def _cache(read: Read) -> tuple[KVCache | PagedKVCache, jax.Array | None]:
    scale = np.full((Nkv, D), 0.02, np.float32)
    cache: KVCache | PagedKVCache
    if read.block is None:
        cache, table = KVCache.create(read.B, read.rows, Nkv, D, scale_k=scale, scale_v=scale), None
    else:
        blocks = read.B * read.rows // read.block
        cache = PagedKVCache.create(blocks, read.block, Nkv, D, scale_k=scale, scale_v=scale)
        order = np.random.default_rng(0).permutation(blocks)
        table = jnp.asarray(order.reshape(read.B, -1), jnp.int32)
    codes = [jax.random.bits(jax.random.key(i), cache.k_cache.shape, jnp.uint8) for i in range(2)]
    k_cache, v_cache = (lax.bitcast_convert_type(c, jnp.int8) for c in codes)
    return dataclasses.replace(cache, k_cache=k_cache, v_cache=v_cache), table


def _read_steps(read: Read) -> Steps:
    cache, table = _cache(read)
    q = jax.random.normal(jax.random.key(2), (read.B, read.S, Nq, D), jnp.bfloat16)
    lengths = jnp.full((read.B,), read.rows, jnp.int32)

    def step(state, cache, implementation):
        out = decode_attention(
            state, cache, lengths, block_table=table, implementation=implementation
        )
        return out, ()

    def steps(name):
        jitted = jax.jit(functools.partial(step, implementation=name))
        return lambda: q, jitted, (cache,)

    timed = {"native": steps(None if read.S > MAX_QUERIES else "ffi"), "xla": steps("xla")}
    if read.block is None:
        shape = (read.B, read.rows, Nkv, D)
        k, v = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in (3, 4))

        # A whole prompt is causal. The queries of a part of one are timed as if they saw all rows,
        # which is faster than under a mask.
        whole = read.rows == read.S
        seen = {"is_causal": True} if whole else {"key_value_seq_lengths": lengths}

        def cudnn(state, k, v):
            out = jax.nn.dot_product_attention(state, k, v, implementation="cudnn", **seen)
            return out, ()

        timed["cudnn_bfloat16"] = (lambda: q, jax.jit(cudnn), (k, v))
    return timed


def measure(rounds: int) -> dict[str, Any]:
    """Times every shape: microseconds per call, and the kernels' share of copy bandwidth."""
    if reason := backends.unavailable("gpu", NAME):
        raise CommandError(f"nothing to measure: {reason}.")
    bandwidth = copy_bandwidth(rounds)
    rows = {}
    for name, tokens in WRITES.items():
        rows[f"write, {name}"] = _time(*_write_steps(tokens), rounds)
    for name, read in READS.items():
        rows[f"attention, {name}"] = _time(_read_steps(read), read.bytes_moved, rounds)
    for row in rows.values():
        row["share_of_copy"] = row["bytes"] / (row["kernels"]["native"] * 1e-6) / bandwidth
    return {
        "device": jax.devices()[0].device_kind,
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "microseconds": rows,
    }


def report(rounds: int, as_json: bool) -> None:
    """Measures and prints."""
    measured = measure(rounds)
    if as_json:
        print(json.dumps(measured, indent=2))
        return
    copied = measured["copy_gigabytes_per_second"]
    print(
        f"{measured['device']}, copy bandwidth {copied:,.0f} GB/s; microseconds of a call, and of"
    )
    print("its kernels alone, as the profiler sees them")
    names = ("native", "xla", "cudnn_bfloat16")
    columns = (*names, *(f"{name} k." for name in names), "share of copy")
    print(f"{'':30}" + "".join(f"{column:>18}" for column in columns))
    for shape, row in measured["microseconds"].items():
        cells = [
            f"{row[kind][name]:,.1f}" if name in row[kind] else ""
            for kind in ("call", "kernels")
            for name in names
        ]
        cells.append(f"{100 * row['share_of_copy']:.0f} %")
        print(f"{shape:30}" + "".join(f"{cell:>18}" for cell in cells))
