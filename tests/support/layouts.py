"""Calls to place on a mesh of data ("dp") and tensor ("tp") parallel devices, and their layouts."""

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support import oracle
from support.results import assert_results

from jax_kvcache import DequantRopeQuantKvcacheResult

MESHES = [(2, 1), (1, 2), (2, 2), (1, 4)]
B, S, Nq, Nkv, D, C2 = 4, 2, 8, 4, 8, 512
T, H = B * S, (Nq + 2 * Nkv) * D


class Layout(NamedTuple):
    """Where things lie, and the bytes that each device receives for it: `moved(dp, tp)`."""

    cache_mode: str
    C1: int
    tokens: str | None  # the mesh axis of B
    columns: str | None  # the mesh axis of H
    cache: P
    moved: object = lambda dp, tp: 0


TABLE = json.loads((Path(__file__).parents[2] / "notebooks" / "layouts.json").read_text())


def bytes_received(entry, dp, tp):
    """Bytes that each device receives in automatic and explicit mode, as the table says."""
    devices, axes, received = {"dp": dp, "tp": tp}, entry["axes"], entry["receives"]
    if received is None or devices[received["over"]] == 1:
        return 0
    sizes = {
        "T": T, "T_here": T // devices.get(axes.get("tokens"), 1), "H": H,
        "Nkv_here": Nkv // devices.get(axes.get("heads"), 1), "D": D,
    }  # fmt: skip
    arrays = [TABLE["bytes"][name] for name in received["arrays"]]
    return sum(math.prod(sizes.get(factor, factor) for factor in array) for array in arrays)


def from_table(entry):
    """A layout of the table, for this file's sizes."""
    axes = {k: tuple(v) if isinstance(v, list) else v for k, v in entry["axes"].items()}
    return Layout(
        entry["cache_mode"],
        entry["C1_over_B"] * B,
        axes.get("tokens"),
        axes.get("columns"),
        P(axes.get("blocks"), axes.get("rows"), axes.get("heads")),
        functools.partial(bytes_received, entry),
    )


LAYOUTS = {name: from_table(entry) for name, entry in TABLE["layouts"].items()}


@functools.cache
def arguments(cache_mode, C1):
    """NumPy arguments: some slots out of range, no slot twice."""
    rng = np.random.default_rng(7)
    indices = np.array([0, C2 - 1, -3, 40], np.int32)
    if cache_mode == "page":
        indices = np.array([[0, C1 * C2 - 1], [-1, C1 * C2], [600, 2000], [1, 1024]], np.int32)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return dict(
        x=rng.integers(-4000, 4000, (B, S, H)).astype(np.int32),
        cos=normal(B, S, 1, D).astype(np.float16),
        sin=normal(B, S, 1, D).astype(np.float16),
        k_cache=rng.integers(-128, 128, (C1, C2, Nkv, D)).astype(np.int8),
        v_cache=rng.integers(-128, 128, (C1, C2, Nkv, D)).astype(np.int8),
        indices=indices,
        scale_k=np.abs(normal(Nkv, D)) + 0.01,
        scale_v=np.abs(normal(Nkv, D)) + 0.01,
        offset_k=normal(Nkv, D),
        offset_v=normal(Nkv, D),
        weight_scale=np.abs(normal(H)) / 1000 + 1e-5,
        activation_scale=np.abs(normal(B, S)) + 0.1,
        bias=normal(H),
    )


@functools.cache
def expected(cache_mode, C1):
    return oracle.dequant_rope_quant_kvcache(
        **arguments(cache_mode, C1), kv_output=True, cache_mode=cache_mode
    )


def specs(layout):
    """The PartitionSpec of each argument."""
    tokens, heads = P(layout.tokens), P(*[*layout.cache, None, None, None][2:3])
    per_token = ("cos", "sin", "indices", "activation_scale")
    return {
        "x": P(layout.tokens, None, layout.columns),
        "k_cache": layout.cache,
        "v_cache": layout.cache,
        **dict.fromkeys(per_token, tokens),
        **dict.fromkeys(("scale_k", "scale_v", "offset_k", "offset_v"), heads),
        **dict.fromkeys(("weight_scale", "bias"), P(layout.columns)),
    }


def result_shardings(layout, mesh):
    """Tokens as in x, heads as in the cache."""
    heads = [*layout.cache, None, None, None][2]
    rows = NamedSharding(mesh, P(layout.tokens, None, heads))
    cache = NamedSharding(mesh, layout.cache)
    return DequantRopeQuantKvcacheResult(rows, rows, rows, cache, cache)


def placed(layout, mesh):
    where = specs(layout)
    return {
        name: jax.device_put(value, NamedSharding(mesh, where[name]))
        for name, value in arguments(layout.cache_mode, layout.C1).items()
    }


def check(result, layout):
    assert_results(result, expected(layout.cache_mode, layout.C1))
