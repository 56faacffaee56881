"""What creating and updating a cache refuses, with its messages."""

import contextlib
import dataclasses
import functools

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType
from support import caches

from jax_kvcache import (
    KVCache,
    PagedKVCache,
    decode_attention,
    explain_attention,
    local_slots,
    slots_from_block_table,
)

Nkv, D, B, S = caches.Nkv, caches.D, caches.B, caches.S
ONES = np.ones((Nkv, D), np.float32)

CREATE = [
    ((0, 4, Nkv, D), {}, ValueError, "`batch` must be at least 1, got 0"),
    ((1, 4.0, Nkv, D), {}, TypeError, "`length` must be an int, got 4.0"),
    ((1, 4, Nkv, D), {"layers": 0}, ValueError, "`layers` must be at least 1, got 0"),
    ((1, 4, Nkv, 15), {}, ValueError, "`head_dim` must be even, got 15"),
    ((1, 4, 4, D), {}, ValueError,
     r"`scale_k` must have shape \[Nkv, D\] = \[4, 16\], got \[2, 16\]"),
    ((1, 4, Nkv, D), {"layers": 3, "scale_v": np.ones((2, Nkv, D), np.float32)}, ValueError,
     r"`scale_v` must have shape \[L, Nkv, D\] = \[3, 2, 16\], got \[2, 2, 16\]"),
    ((1, 4, Nkv, D), {"scale_k": ONES.astype(np.int32)}, TypeError,
     "`scale_k` must be floating-point, got int32"),
    ((1, 4, Nkv, D), {"offset_k": ONES}, ValueError, "got `offset_k` without `offset_v`"),
    ((1, 4, Nkv, D), {"offset_v": ONES}, ValueError, "got `offset_v` without `offset_k`"),
    ((1, 4, Nkv, D), {"num_q_heads": 4.0}, TypeError, "`num_q_heads` must be an int, got 4.0"),
    ((1, 4, Nkv, D), {"num_q_heads": 0}, ValueError, "`num_q_heads` must be at least 1, got 0"),
    ((2**16, 2**15, Nkv, D), {}, ValueError,
     "at most 2147483647 rows .* batch, length = 2147483648"),
]  # fmt: skip


@pytest.mark.parametrize(("sizes", "options", "error", "message"), CREATE)
def test_create_refuses(sizes, options, error, message):
    with pytest.raises(error, match=message):
        KVCache.create(*sizes, **{"scale_k": ONES, "scale_v": ONES} | options)


def with_one(value, layers=None):
    values = np.ones((Nkv, D) if layers is None else (layers, Nkv, D), np.float32)
    values[..., 1, 3] = value
    return values


SUBNORMAL = np.finfo(np.float32).smallest_subnormal


@pytest.mark.parametrize("cls", [KVCache, PagedKVCache])
@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf, SUBNORMAL], ids=str)
@pytest.mark.parametrize("name", ["scale_k", "scale_v"])
def test_create_refuses_what_no_scale_can_be(name, value, layers, cls):
    scales = {"scale_k": ONES, "scale_v": ONES} | {name: with_one(value, layers)}
    count = 1 if layers is None else 2
    message = (
        rf"`{name}` must be finite and at least 1.1754\d*e-38, .* got .*1, 3\], and {count} such"
    )
    with pytest.raises(ValueError, match=message):
        cls.create(1, 4, Nkv, D, layers=layers, **scales)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_create_refuses_what_no_offset_can_be(value):
    offsets = {"offset_k": ONES, "offset_v": with_one(value)}
    with pytest.raises(
        ValueError, match=r"`offset_v` must be finite, got (nan|-inf) at \[Nkv, D\]"
    ):
        KVCache.create(1, 4, Nkv, D, scale_k=ONES, scale_v=ONES, **offsets)


def test_create_takes_the_smallest_scale_and_one_that_is_not_known():
    smallest = with_one(np.finfo(np.float32).tiny)
    KVCache.create(1, 4, Nkv, D, scale_k=smallest, scale_v=smallest, offset_k=-ONES, offset_v=ONES)
    create = jax.jit(lambda scale: KVCache.create(1, 4, Nkv, D, scale_k=scale, scale_v=scale))
    assert np.asarray(create(with_one(0)).scale_k)[1, 3] == 0


def test_create_paged_refuses():
    with pytest.raises(ValueError, match="`block_size` must be at least 1, got 0"):
        PagedKVCache.create(4, 0, Nkv, D, scale_k=ONES, scale_v=ONES)


FLOAT_X = {"x": np.ones((B, S, caches.H), ml_dtypes.bfloat16)}

UPDATE = [
    ("contiguous", None, {"positions": np.zeros((B, S), np.int32)}, TypeError,
     r"`positions` must be 1-D, got 2-D \[3, 2\]"),
    ("contiguous", None, {"positions": np.zeros(B, np.float32)}, TypeError, "got float32"),
    ("contiguous", None, {"block_table": caches.TABLE}, TypeError,
     "`block_table` must be None for a KVCache: only"),
    ("contiguous", None, {"layer": 0}, TypeError,
     "`layer` must be None for a cache without layers"),
    ("contiguous", 3, {}, TypeError, "`layer` is required for a cache with 3 layers, got None"),
    ("contiguous", 3, {"layer": 3}, ValueError, r"`layer` must be in \[0, 3\), got 3"),
    ("contiguous", 3, {"layer": np.zeros(2, np.int32)}, TypeError,
     "`layer` must be an integer scalar, got array"),
    ("contiguous", 3, {"layer": 0, "weight_scale": None}, TypeError, "`weight_scale` is required"),
    ("contiguous", 3, {"layer": 0, "x": np.zeros((B, S, 100), np.int32)}, ValueError,
     "`x` must have H"),
    ("contiguous", None, {"implementation": "cuda"}, ValueError, "`implementation` must be"),
    ("contiguous", None, FLOAT_X | {"activation_scale": None, "bias": None}, TypeError,
     "`weight_scale` has no effect where `x` is bfloat16"),
    ("contiguous", None, FLOAT_X | {"weight_scale": None, "bias": None}, TypeError,
     "`activation_scale` has no effect where `x` is bfloat16"),
    ("paged", None, FLOAT_X | {"block_table": caches.TABLE, "positions": caches.POSITIONS},
     TypeError, "`weight_scale` and `activation_scale` and `bias` have no effect"),
    ("contiguous", None, {"x": np.zeros((B, S, caches.H), np.int64)}, TypeError,
     "`x` must have dtype int32 or float16 or bfloat16 or float32, got int64"),
    ("contiguous", 3, {"x": np.zeros((B, S, caches.H), np.int8), "layer": 1}, TypeError,
     "`x` must have dtype int32 .*, got int8"),
    ("paged", None, {"x": np.zeros((B, S, caches.H)), "block_table": caches.TABLE,
                     "positions": caches.POSITIONS}, TypeError,
     "`x` must have dtype int32 .*, got float64"),
    ("paged", None, {}, TypeError, "`block_table` is required for a PagedKVCache, got None"),
    ("paged", None, {"block_table": caches.TABLE}, TypeError,
     r"`positions` must be 2-D, got 1-D \[3\]"),
    ("paged", 3, {"block_table": caches.TABLE, "positions": np.zeros((B, 9), np.int32),
                  "layer": 1}, ValueError,
     r"`positions` must have shape \[B, S\] = \[3, 2\], got \[3, 9\]"),
    ("contiguous", None, {"positions": np.zeros(2, np.int32)}, ValueError,
     r"`positions` must have shape \[B\] = \[3\], got \[2\]"),
    ("contiguous", None, {"x": [np.zeros((B, S, n), np.int32) for n in (64, 32, 32)]}, TypeError,
     r"`x` must be an array or a tuple \(q, k, v\) of arrays, got list"),
    ("paged", None, {"x": None, "block_table": caches.TABLE, "positions": caches.POSITIONS},
     TypeError, "`x` must be an array .*, got NoneType"),
    ("contiguous", None, {"x": np.zeros((B, 128), np.int32)}, TypeError,
     r"`x` must have shape \[B, S, H\], got \[3, 128\]"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "layers", "options", "error", "message"), UPDATE)
def test_update_refuses(kind, layers, options, error, message):
    rng = np.random.default_rng(0)
    cache = caches.make(kind, rng, layers=layers)
    call = caches.tokens(rng) | {"positions": np.zeros(B, np.int32)} | options
    with pytest.raises(error, match=message):
        cache.update(**call)


ROW = np.ones((1, D), np.float32)
FLAT = np.ones(Nkv * D, np.float32)
LAYERED = np.ones((3, Nkv, D), np.float32)
NO_CODES = np.zeros((B, 0, Nkv, D), np.int8)

FIELDS = [  # of a cache that `create` did not make
    (None, {"k_cache": NO_CODES, "v_cache": NO_CODES}, ValueError,
     "`k_cache` has an empty dimension: C2 = 0"),
    (None, {"scale_k": ROW}, ValueError,
     r"`scale_k` must have shape \[Nkv, D\] = \[2, 16\], got \[1, 16\]"),
    (None, {"scale_k": FLAT}, TypeError, r"`scale_k` must be 2-D, got 1-D \[32\]"),
    (None, {"scale_v": LAYERED}, TypeError, r"`scale_v` must be 2-D, got 3-D \[3, 2, 16\]"),
    (3, {"scale_v": ONES}, TypeError, r"`scale_v` must be 3-D, got 2-D \[2, 16\]"),
    (3, {"scale_v": LAYERED[:2]}, ValueError,
     r"`scale_v` must have shape \[L, Nkv, D\] = \[3, 2, 16\], got \[2, 2, 16\]"),
    (None, {"scale_k": ONES.astype(ml_dtypes.bfloat16)}, TypeError,
     "`scale_k` must have dtype float32, got bfloat16"),
    (None, {"scale_v": ONES.astype(np.int32)}, TypeError,
     "`scale_v` must have dtype float32, got int32"),
    (None, {"scale_v": None}, TypeError, "`scale_v` is required, got None"),
    (None, {"offset_v": ONES}, ValueError, "got `offset_v` without `offset_k`"),
    (None, {"offset_k": ROW, "offset_v": ROW}, ValueError,
     r"`offset_k` must have shape \[Nkv, D\] = \[2, 16\], got \[1, 16\]"),
    (None, {"offset_k": ONES, "offset_v": ONES.astype(np.float16)}, TypeError,
     "`offset_v` must have dtype float32, got float16"),
]  # fmt: skip


def update(cache, layer):
    tokens = caches.tokens(np.random.default_rng(0))
    cache.update(**tokens, positions=np.zeros(B, np.int32), layer=layer)


def attend(cache, layer, function=decode_attention, **options):
    q = np.zeros((B, S, caches.Nq, D), np.float32)
    function(q, cache, np.zeros(B, np.int32), layer=layer, **options)


READERS = {
    "update": update,
    "attention, xla": functools.partial(attend, implementation="xla"),
    "attention, ffi": functools.partial(attend, implementation="ffi"),
    "explain": functools.partial(attend, function=explain_attention),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("layers", "fields", "error", "message"), FIELDS)
def test_fields_that_do_not_fit(layers, fields, error, message, reader):
    cache = caches.make("contiguous", np.random.default_rng(0), layers=layers)
    with pytest.raises(error, match=message):
        READERS[reader](dataclasses.replace(cache, **fields), None if layers is None else 1)


NAMES = [
    (3, TypeError, "`axis_name` must be a string, a tuple of strings or None, got 3"),
    (("dp", 0), TypeError, r"a tuple of strings or None, got \('dp', 0\)"),
    ("dp", ValueError, "`axis_name` must name mesh axes that are manual .*shard_map, got 'dp'"),
]


@pytest.mark.parametrize("mesh", [False, True])
@pytest.mark.parametrize(("axis_name", "error", "message"), NAMES)
def test_axis_names(axis_name, error, message, mesh):
    """Outside of shard_map, also where there is a mesh."""
    rng = np.random.default_rng(0)
    cache, q = caches.make("contiguous", rng), np.zeros((B, S, caches.Nq, D), np.float32)
    tokens, rows = caches.tokens(rng), np.zeros(B, np.int32)
    devices = jax.make_mesh((4,), ("dp",), (AxisType.Explicit,))
    with jax.set_mesh(devices) if mesh else contextlib.nullcontext():
        with pytest.raises(error, match=message):
            cache.update(**tokens, positions=rows, axis_name=axis_name)
        with pytest.raises(error, match=message):
            decode_attention(q, cache, rows, axis_name=axis_name)
        with pytest.raises(error, match=message):
            local_slots(rows, 4, axis_name)
    with pytest.raises(TypeError, match="`axis_name` must name a mesh axis, got None"):
        local_slots(rows, 4, None)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_a_head_too_few_in_x(kind):
    rng = np.random.default_rng(0)
    cache = dataclasses.replace(caches.make(kind, rng), num_q_heads=caches.Nq)
    call = caches.tokens(rng) | {"positions": np.zeros(B, np.int32)}
    if kind == "paged":
        call |= {"positions": caches.POSITIONS, "block_table": caches.TABLE}
    q, after = cache.update(**call)
    assert q.shape[2] == after.num_q_heads == caches.Nq
    short = {n: call[n][..., caches.D :] for n in ("x", "weight_scale", "bias")}
    message = r"D = 128 with Nq = `num_q_heads` = 4, Nkv = 2 and D = 16, got H = 112, .* Nq = 3"
    with pytest.raises(ValueError, match=message):
        cache.update(**call | short)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros(3, np.int32), np.zeros((3, 1), np.int32), 4), TypeError,
         "`block_table` must be 2-D, got 1-D"),
        ((np.zeros((3, 1)), np.zeros((3, 1), np.int32), 4), TypeError,
         "`block_table` must have dtype int32, got float"),
        ((np.zeros((2, 1), np.int32), np.zeros((3, 1), np.int32), 4), ValueError,
         r"`block_table` must have shape \[B, M\] = \[3, any\], got \[2, 1\]"),
        ((np.zeros((3, 1), np.int32), np.zeros((3, 1), np.int32), 0), ValueError,
         r"`block_size` must be in \[1, 2147483647\], got 0"),
    ],
)  # fmt: skip
def test_slots_from_block_table_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        slots_from_block_table(*arguments)
