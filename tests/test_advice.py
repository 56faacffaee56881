"""The advice of every error: the call that it was about, changed as the error says, passes."""

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import caches, calls

import jax_kvcache
from jax_kvcache import (
    BlockAllocator,
    KVCache,
    PagedKVCache,
    decode_attention,
    deinterleave_qkv_for_tensor_parallel,
    dequant_rope_quant_kvcache,
    explain,
    interleave_qkv_for_tensor_parallel,
    numerics,
    rope_tables,
)

Nq, Nkv, D = 4, 2, 64
SPLITS = (Nq * D, Nkv * D, Nkv * D)
ONES = np.ones((Nkv, D), np.float32)
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


class Case(NamedTuple):
    """A call that fails, what its error says, and the same call as the error advises."""

    call: Any
    wrong: dict[str, Any]
    message: str
    mended: dict[str, Any]


def operator(x_dtype=jnp.int32, **changed):
    sizes = dict(B=2, S=3, Nq=Nq, Nkv=Nkv, D=D, C1=2, C2=8)
    return dequant_rope_quant_kvcache(**calls.ones(**sizes, x_dtype=x_dtype) | changed)


def create(batch=2, length=8, **changed):
    return KVCache.create(batch, length, Nkv, D, **{"scale_k": ONES, "scale_v": ONES} | changed)


def shapes_of_rows(C1, C2, parts=1):
    call = calls.arguments(B=1, S=1, D=2, C1=C1 // parts, C2=C2, cache_mode="page")
    return jax.eval_shape(lambda c: dequant_rope_quant_kvcache(**c, cache_mode="page"), call)


def update(kind="contiguous", layers=None, x=None, **changed):
    rng = np.random.default_rng(0)
    cache = caches.make(kind, rng, layers=layers)
    call = caches.tokens(rng) | {"positions": np.zeros(caches.B, np.int32)} | changed
    if x is not None:
        call["x"] = x
    return cache.update(**call)


def attend(kind="contiguous", **changed):
    cache = caches.make(kind, np.random.default_rng(0))
    q = jnp.ones((caches.B, 1, caches.Nq, caches.D))
    return decode_attention(q, cache, **changed)


def interleaved(**changed):
    call = {"size_splits": SPLITS, "shards": 2} | changed
    return interleave_qkv_for_tensor_parallel(np.zeros(sum(call["size_splits"])), **call)


def on_mesh(cache, kind=AUTO, v_cache=None, out=None, heads=4, mesh=(2, 2), **sizes):
    mesh = jax.make_mesh(mesh, ("dp", "tp"), (kind,) * 2)
    call = calls.ones(**dict(B=4, S=1, Nq=heads, Nkv=4, D=8, C1=4, C2=8) | sizes)
    where = {"k_cache": cache, "v_cache": cache if v_cache is None else v_cache}
    call = {n: jax.device_put(a, NamedSharding(mesh, where.get(n, P()))) for n, a in call.items()}
    out = None if out is None else (None, *[NamedSharding(mesh, out)] * 2)

    def step(call):
        result = dequant_rope_quant_kvcache(**call)
        return result.q, result.k_cache, result.v_cache

    return jax.jit(step, out_shardings=out)(call)


def constrained(**sizes):
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (AUTO,) * 2)
    call = calls.ones(**dict(B=4, S=1, Nq=4, Nkv=4, D=8, C1=4) | sizes)
    call = jax.device_put(call, NamedSharding(mesh, P()))

    def step(call):
        rows = NamedSharding(mesh, P(None, "tp"))
        of_rows = {
            n: jax.lax.with_sharding_constraint(call[n], rows) for n in ("k_cache", "v_cache")
        }
        return dequant_rope_quant_kvcache(**call | of_rows).q

    return jax.jit(step)(call)


def attend_on_mesh(codes, v_codes=None, **changed):
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (EXPLICIT,) * 2)
    ones = np.ones((4, 8))
    cache = PagedKVCache.create(4, 8, 4, 8, scale_k=ones, scale_v=ones)
    q, table = jnp.ones((2, 1, 4, 8)), jnp.zeros((2, 3), jnp.int32)
    specs = [codes, codes if v_codes is None else v_codes]
    k_cache, v_cache = (
        jax.device_put(a, NamedSharding(mesh, s))
        for a, s in zip((cache.k_cache, cache.v_cache), specs, strict=True)
    )
    cache = dataclasses.replace(cache, k_cache=k_cache, v_cache=v_cache)
    with jax.set_mesh(mesh):
        return jax.jit(lambda q: decode_attention(q, cache, [8, 9], block_table=table, **changed))(
            q
        )


def partly_manual(axis_names):
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (AUTO,) * 2)
    call = calls.ones(B=4, S=1, Nq=4, Nkv=4, D=8, C1=4, C2=8)
    one = jax.shard_map(
        lambda call: dequant_rope_quant_kvcache(**call).k_cache,
        mesh=mesh, in_specs=P(), out_specs=P(), axis_names=axis_names,
    )  # fmt: skip
    return jax.jit(one)(call)


def exported(kind):
    mesh = jax.make_mesh((2,), ("dp",), (kind,))
    call = calls.ones(B=4, S=1, Nq=4, Nkv=4, D=8, C1=4, C2=8)
    rows = {"x", "cos", "sin", "k_cache", "v_cache", "indices"}
    where = {n: NamedSharding(mesh, P("dp") if n in rows else P()) for n in call}
    step = jax.jit(lambda call: dequant_rope_quant_kvcache(**call, implementation="xla").k_cache)
    return jax.export.export(step)(jax.device_put(call, where))


def in_shard_map(order="plain", **more):
    mesh = jax.make_mesh((2,), ("tp",), (AUTO,))
    call = calls.ones(B=1, S=1, Nq=Nq, Nkv=Nkv, D=D, C1=1, C2=8)
    columns = {"x": P(None, None, "tp"), "weight_scale": P("tp")}
    if order == "interleaved":
        for name in columns:
            call[name] = interleave_qkv_for_tensor_parallel(call[name], SPLITS, 2)
    if order == "apart":
        for name in columns:
            call[name] = tuple(jnp.split(call[name], np.cumsum(SPLITS)[:2], axis=-1))
    heads = {n: P("tp") for n in ("scale_k", "scale_v")}
    heads |= {n: P(None, None, "tp") for n in ("k_cache", "v_cache")}
    one = jax.shard_map(
        lambda call: dequant_rope_quant_kvcache(**call, **more).q,
        mesh=mesh, in_specs=({n: (columns | heads).get(n, P()) for n in call},),
        out_specs=P(None, None, "tp"),
    )  # fmt: skip
    return jax.jit(one)(call)


def undo_interleaving(columns, **more):
    call = calls.ones(B=1, S=1, Nq=Nq, Nkv=Nkv, D=D, C1=1, C2=8)
    for name in ("x", "weight_scale"):
        call[name] = interleave_qkv_for_tensor_parallel(call[name], SPLITS, 2)
        if columns == "plain":
            call[name] = deinterleave_qkv_for_tensor_parallel(call[name], SPLITS, 2)
    return dequant_rope_quant_kvcache(**call, **more)


def on_ascend(degree):
    sizes = dict(B=1, S=1, Nq=32 // degree, Nkv=8 // degree, D=128, C1=1, C2=8)
    said = explain(**calls.arguments(**sizes), platform="ascend")
    if "fits" in said.reason or "H <= " in said.reason:
        raise ValueError(said.reason)


def derivative(stop):
    call = calls.ones(B=1, S=1, Nq=Nq, Nkv=Nkv, D=D, C1=1, C2=8, x_dtype=jnp.float32)

    def loss(x):
        x = jax.lax.stop_gradient(x) if stop else x
        return dequant_rope_quant_kvcache(**call | {"x": x}).q.sum()

    return jax.grad(loss)(call["x"])


def calibrate(observer="MinMax", **options):
    return numerics.calibrate(getattr(numerics, observer).create((Nkv, D)), **options)


def prompt(tokens, length):
    k = jnp.ones((1, tokens, Nkv, D))
    return KVCache.calibrated(k, k, length)[0].k_cache


def block_table(columns):
    allocator = BlockAllocator(8, 4)
    return allocator.block_table([allocator.allocate(9)], columns)


def allocate(tokens):
    return BlockAllocator(3, 4).allocate(tokens)


FLOAT = {"x": np.ones((caches.B, caches.S, caches.H), np.float32)}
TABLES = {n: np.ones((caches.B, caches.S, 1, caches.D), np.float32) for n in ("cos", "sin")}
NOTHING = {"weight_scale": None, "activation_scale": None, "bias": None}
H = sum(SPLITS)

CASES = {
    "a lone offset": Case(
        operator, {"offset_k": ONES}, "without `offset_v`. Pass zeros for the one without an off",
        {"offset_k": ONES, "offset_v": np.zeros_like(ONES)},
    ),
    "a cache's lone offset": Case(
        create, {"offset_v": ONES}, "without `offset_k`. Pass zeros for the one without an offset",
        {"offset_v": ONES, "offset_k": np.zeros_like(ONES)},
    ),
    "too many rows": Case(
        shapes_of_rows, {"C1": 2**16, "C2": 2**15}, "2147483648. Split the cache",
        {"C1": 2**16, "C2": 2**15, "parts": 2},
    ),
    "arguments that a float x does not have": Case(
        update, FLOAT | TABLES, "have no effect .* Apply them to `x` first, or leave them out",
        FLOAT | TABLES | NOTHING,
    ),
    "a weight_scale is missing": Case(
        operator, {"weight_scale": None}, "`weight_scale` is required when `x` is int32",
        {"weight_scale": np.ones(H, np.float32)},
    ),
    "x alone apart": Case(
        operator, {"x": tuple(np.ones((2, 3, w), np.int32) for w in SPLITS)},
        r"`weight_scale` must be a tuple \(q, k, v\), .* Give all in one form",
        {"x": tuple(np.ones((2, 3, w), np.int32) for w in SPLITS),
         "weight_scale": tuple(np.ones(w, np.float32) for w in SPLITS)},
    ),
    "size_splits": Case(
        operator, {"size_splits": (128, 192, 192)}, r"must be \(Nq\*64, 128, 128\)",
        {"size_splits": (4 * 64, 128, 128)},
    ),
    "num_q_heads": Case(
        operator, {"num_q_heads": 5}, r"got H = 512, which is Nq = 4", {"num_q_heads": 4},
    ),
    "no layer": Case(
        update, {"layers": 3}, "`layer` is required for a cache with 3 layers",
        {"layers": 3, "layer": 2},
    ),
    "a layer too many": Case(
        update, {"layer": 0}, "`layer` must be None for a cache without layers", {"layer": None},
    ),
    "no block table": Case(
        update, {"kind": "paged", "positions": caches.POSITIONS}, "`block_table` is required",
        {"kind": "paged", "positions": caches.POSITIONS, "block_table": caches.TABLE},
    ),
    "a block table too many": Case(
        update, {"block_table": caches.TABLE}, "`block_table` must be None for a KVCache",
        {"block_table": None},
    ),
    "a scale of 0": Case(
        create, {"scale_k": 0 * ONES}, "must be finite and at least 1.1754",
        {"scale_k": np.float32(1.1754943508222875e-38) * ONES},
    ),
    "neither lengths nor positions": Case(
        attend, {}, "exactly one of `lengths` .* got neither", {"lengths": [1, 2, 3]},
    ),
    "both lengths and positions": Case(
        attend, {"lengths": [1, 2, 3], "positions": [[0], [1], [2]]}, "exactly one .* got both",
        {"positions": [[0], [1], [2]]},
    ),
    "no window": Case(
        attend, {"lengths": [1, 2, 3], "window": 0}, r"at least 1, got 0. None sees all rows",
        {"lengths": [1, 2, 3], "window": None},
    ),
    "fewer devices than shards": Case(
        interleaved, {"size_splits": (512, 64, 64), "shards": 8},
        "Use at most as many devices as there are kv heads",
        {"size_splits": (512, 64, 64), "shards": 4},
    ),
    "half a head for each device": Case(
        interleaved, {"size_splits": (512, 64, 64), "shards": 8},
        "or pass `head_dim` = 8 if the heads are so small",
        {"size_splits": (512, 64, 64), "shards": 8, "head_dim": 8},
    ),
    "more shards than kv heads": Case(
        interleaved, {"size_splits": (512, 64, 64), "shards": 8, "head_dim": 16},
        "Share the heads among 4 devices", 
        {"size_splits": (512, 64, 64), "shards": 4, "head_dim": 16},
    ),
    "more shards than kv heads, which are repeated": Case(
        interleaved, {"size_splits": (512, 64, 64), "shards": 8, "head_dim": 16},
        "or repeat each kv head in the projection",
        {"size_splits": (512, 128, 128), "shards": 8, "head_dim": 16},
    ),
    "shards that q's heads do not have": Case(
        interleaved, {"size_splits": (96, 64, 64), "shards": 4, "head_dim": 16},
        "Share the heads among 2 devices",
        {"size_splits": (96, 64, 64), "shards": 2, "head_dim": 16},
    ),
    "an order outside shard_map": Case(
        undo_interleaving, {"columns": "interleaved", "qkv_shards": 2},
        r"Undo the interleaving with `deinterleave_qkv_for_tensor_parallel\(w, size_splits, 2",
        {"columns": "plain"},
    ),
    "the plain order in shard_map": Case(
        in_shard_map, {"qkv_shards": 1},
        r"Put the columns .*`interleave_qkv_for_tensor_parallel\(w, size_splits, 2\)` and pass",
        {"order": "interleaved", "qkv_shards": 2},
    ),
    "the plain order in shard_map, apart": Case(
        in_shard_map, {"qkv_shards": 1}, r"or pass `x`, `weight_scale` and `bias` as tuples",
        {"order": "apart"},
    ),
    "a sharded head dimension": Case(
        on_mesh, {"cache": P(None, None, None, "tp")}, "Shard Nkv instead",
        {"cache": P(None, None, "tp")},
    ),
    "caches in two places": Case(
        on_mesh, {"cache": P("dp"), "v_cache": P(None, "dp")}, "Place both caches with one shardi",
        {"cache": P("dp"), "v_cache": P("dp")},
    ),
    "fewer q heads than devices": Case(
        on_mesh, {"cache": P(None, None, "tp"), "heads": 2, "mesh": (1, 4)},
        "Use fewer devices for the heads",
        {"cache": P(None, None, "tp"), "heads": 2, "mesh": (2, 2)},
    ),
    "a cache that comes out elsewhere": Case(
        on_mesh, {"cache": P(None, "dp"), "out": P("dp")},
        "Give it the same sharding in out_shardings",
        {"cache": P(None, "dp"), "out": P(None, "dp")},
    ),
    "rows that the devices do not divide": Case(
        constrained, {"C2": 7}, "Make it larger, or use fewer devices for it", {"C2": 8},
    ),
    "attention, a sharded head dimension": Case(
        attend_on_mesh, {"codes": P(None, None, None, "tp")}, "Shard Nkv instead",
        {"codes": P(None, None, "tp")},
    ),
    "attention, caches in two places": Case(
        attend_on_mesh, {"codes": P("dp"), "v_codes": P(None, "dp")}, "Place both caches with one",
        {"codes": P("dp"), "v_codes": P("dp")},
    ),
    "attention, a window over rows in parts": Case(
        attend_on_mesh, {"codes": P(None, "dp"), "window": 3}, "Shard the blocks instead",
        {"codes": P("dp"), "window": 3},
    ),
    "automatic beside manual axes": Case(
        partly_manual, {"axis_names": {"dp"}}, "Make them all manual",
        {"axis_names": {"dp", "tp"}},
    ),
    "an export in automatic mode": Case(
        exported, {"kind": AUTO}, "cannot be exported.* Use explicit mesh axes",
        {"kind": EXPLICIT},
    ),
    "a derivative": Case(
        derivative, {"stop": False}, "Use jax.lax.stop_gradient on its inputs", {"stop": True},
    ),
    "too wide for Ascend": Case(
        on_ascend, {"degree": 1}, r"tensor parallelism over 2 devices fits \(H = 3072\)",
        {"degree": 2},
    ),
    "a cache shorter than its prompt": Case(
        prompt, {"tokens": 5, "length": 4}, "must be at least the prompt's S = 5 tokens, got 4",
        {"tokens": 5, "length": 5},
    ),
    "too few columns": Case(
        block_table, {"columns": 2}, "`columns` must be at least 3, .* got 2", {"columns": 3},
    ),
    "too few blocks": Case(
        allocate, {"tokens": 13}, "4 blocks are needed and 3 of 3 are free", {"tokens": 12},
    ),
    "absmax with an offset": Case(
        calibrate, {"method": "absmax", "symmetric": False}, "needs a method with an offset",
        {"method": "minmax", "symmetric": False},
    ),
    "a percentile without a sketch": Case(
        calibrate, {"method": "percentile"}, "needs a Sketch observer",
        {"observer": "Sketch", "method": "percentile"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_advice(name):
    case = CASES[name]
    with pytest.raises((TypeError, ValueError, NotImplementedError, RuntimeError)) as raised:
        case.call(**case.wrong)
    assert re.search(case.message, str(raised.value), re.DOTALL)
    jax.block_until_ready(case.call(**case.mended))


@pytest.mark.parametrize("positions", [[[2**31, 0]], [[5, -(2**31) - 1]]])
def test_the_number_that_does_not_fit_is_named(positions):
    worst = max(positions[0], key=abs)
    with pytest.raises(ValueError, match=f"must fit into int32, got {worst}"):
        rope_tables(positions, D)
    rope_tables([[0, -(2**31)]], D)


ADVICE = re.compile(
    r"(?:^|[.] )((?:Use|Pass|Give|Split|Shard|Place|Undo|Put|Apply|Make|Share|Set) \S+ \S+)"
)
ELSEWHERE = {
    "Set it to": "files of a checkpoint, tests/checkpoints/test_advice.py",
    "Make them with": "as above",
}


def advice_in(tree):
    """The first three words of every advice in a module's strings, without its docstrings."""
    expressions = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    docstrings = set(map(id, expressions))
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in docstrings:
            yield from (advice.rstrip(".") for advice in ADVICE.findall(node.value))


def test_every_advice_has_a_case():
    messages = [re.sub(r"\\(.)", r"\1", case.message) for case in CASES.values()]
    package = Path(jax_kvcache.__file__).parent
    found = {a for path in package.rglob("*.py") for a in advice_in(ast.parse(path.read_text()))}
    assert len(found) > 10
    assert set(ELSEWHERE) <= found
    without = {a for a in found - set(ELSEWHERE) if not any(a in m for m in messages)}
    assert not without
