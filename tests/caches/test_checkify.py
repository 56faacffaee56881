"""checkify reports lost tokens and saturated codes; without it, nothing of that is there."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import caches
from support.caches import BLOCK, C2, B, D, Nkv, S
from support.internals import compat, primitive

from jax_kvcache import KVCache, dequant_rope_quant_kvcache, disabled_export_checks

TABLE = np.array([[5, 2, -1], [0, 7, 3], [1, 8, 6]], np.int32)  # there is no block 8


def small(call, factor=1e-3):
    """Values that no code of them is at an end of."""
    return call | {"weight_scale": (call["weight_scale"] * factor).astype(np.float32)}


def step(cache, call):
    return cache.update(**call)


@functools.cache
def checked(function, errors):
    return jax.jit(checkify.checkify(function, errors=errors))


def error_of(cache, call, errors=checkify.user_checks, function=step):
    error, _ = checked(function, errors)(cache, call)
    return error.get()


def made(kind, layers=None):
    rng = np.random.default_rng(0)
    return caches.make(kind, rng, layers=layers, offsets=True), small(caches.tokens(rng))


STARTS = {  # what is written where: (positions, message or None)
    "inside": ([0, C2 - S, 3], None),
    "padding": ([-1, -(2**31), 3], None),
    "one row past": ([0, C2 - S + 1, 3], r"1 of 6 tokens.* is token 3 .*, for row 12 of 12 "),
    "all past": ([0, 3, C2], r"2 of 6 tokens.* is token 4 .*, for row 12 of 12 "),
    "far past": ([2**31 - 1, -1, 0], r"2 of 6 tokens.* is token 0 .*, for row 2147483647 of 12 "),
}


@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("case", STARTS)
def test_contiguous(case, layers):
    positions, message = STARTS[case]
    cache, call = made("contiguous", layers)
    call |= {"positions": np.array(positions, np.int32)}
    if layers:
        call["layer"] = jnp.int32(1)
        message = message and message.split(", for")[0]
    error = error_of(cache, call)
    if message is None:
        assert error is None
    else:
        with pytest.raises(ValueError, match="does not write " + message):
            raise ValueError(error)


def test_a_layer_that_does_not_exist():
    cache, call = made("contiguous", 2)
    call |= {"positions": np.zeros(B, np.int32), "layer": jnp.int32(2)}
    assert "does not write 6 of 6 tokens" in error_of(cache, call)


PAGED = {
    "inside": ([[0, 1], [7, 8], [2, 3]], None),
    "padding": ([[0, -1], [-5, -(2**31)], [2, 3]], None),
    "no block": ([[7, 8], [-1, 8], [2, 3]], "1 of 6 tokens.* is token 1 "),
    "past the table": ([[0, 1], [11, 12], [2, 3]], "1 of 6 tokens.* is token 3 "),
    "no such block": ([[0, 1], [7, 8], [3, 4]], "1 of 6 tokens.* is token 5 .*, for row 32 of 32 "),
}


@pytest.mark.parametrize("case", PAGED)
def test_paged(case):
    positions, message = PAGED[case]
    cache, call = made("paged")
    assert cache.k_cache.shape[:2] == (8, BLOCK)
    error = error_of(cache, call | {"positions": np.int32(positions), "block_table": TABLE})
    if message is None:
        assert error is None
    else:
        with pytest.raises(ValueError, match="does not write " + message):
            raise ValueError(error)


def test_the_operator_itself():
    cache, call = made("contiguous")

    def operator(cache, call):
        scales = {n: getattr(cache, n) for n in ("scale_k", "scale_v", "k_cache", "v_cache")}
        return dequant_rope_quant_kvcache(**call, **scales)

    assert error_of(cache, call | {"indices": np.int32([0, -1, 2])}, function=operator) is None
    error = error_of(cache, call | {"indices": np.int32([0, 11, 2])}, function=operator)
    assert "for row 12 of 12" in error


def test_saturated_codes():
    """Only codes of tokens that are written, with their numbers."""
    cache = KVCache.create(B, C2, Nkv, D, scale_k=np.ones((Nkv, D)), scale_v=np.ones((Nkv, D)))
    _, call = made("contiguous")
    kv = 2 * Nkv * D
    x = np.zeros((B, S, caches.H), np.float32)
    x[0, 0, -Nkv * D] = 127.49  # v: rounds to 127
    x[0, 1, -kv] = -128.5  # k: rounds to -128
    x[2, 0, -kv] = np.nan  # code 0
    tables = {"cos": np.ones((B, S, 1, D), np.float32), "sin": np.zeros((B, S, 1, D), np.float32)}
    call = tables | {"positions": np.array([0, -1, 4], np.int32)}
    assert error_of(cache, call | {"x": x}) is None
    x[1, 0, -kv:] = 1e9  # not written
    assert error_of(cache, call | {"x": x}) is None
    x[2, 1, -kv] = -300.2
    x[2, 1, -Nkv * D :] = 128
    message = r"saturates 1 of 128 codes of K and 32 of 128 of V: .* The largest there is 300\.0"
    with pytest.raises(ValueError, match=message):
        raise ValueError(error_of(cache, call | {"x": x}))
    offsets = {"offset_k": np.full((Nkv, D), 200.0), "offset_v": np.zeros((Nkv, D))}
    shifted = KVCache.create(B, C2, Nkv, D, scale_k=cache.scale_k, scale_v=cache.scale_v, **offsets)
    # All but the four of -128.5, of the NaN and of its pair, and of -300.2.
    assert "saturates 124 of 128 codes of K" in error_of(shifted, call | {"x": x})


@pytest.mark.parametrize("errors", ["user_checks", "index_checks", "float_checks", "all_checks"])
def test_which_checks_report_what(errors):
    wanted = getattr(checkify, errors)
    cache, call = made("contiguous")
    lost = error_of(cache, call | {"positions": np.int32([0, C2, 3])}, wanted)
    saturated = error_of(cache, small(call, 1e6) | {"positions": np.int32([0, 1, 3])}, wanted)
    assert (lost is not None) == (errors != "float_checks")
    assert (saturated is not None) == (errors in ("user_checks", "all_checks"))


def test_vmap_and_scan():
    cache, call = made("contiguous")
    many = np.array([[0, 1, 2], [3, C2 - 1, 5]], np.int32)

    def mapped(cache, call):
        return jax.vmap(lambda p: step(cache, call | {"positions": p}))(many)

    def scanned(cache, call):
        return jax.lax.scan(
            lambda c, p: (step(c, call | {"positions": p})[1], None), cache, jnp.asarray(many)
        )

    assert "1 of 12 tokens" in error_of(cache, call, function=mapped)
    assert "1 of 6 tokens" in error_of(cache, call, function=scanned)


@pytest.mark.parametrize("kind", ["checked", "unchecked", "explicit"])
def test_over_devices(kind):
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2,), ("dp",), (axis_type,))
    rng = np.random.default_rng(0)
    cache = caches.make("contiguous", rng, batch=4)
    call = small(caches.tokens(rng, batch=4)) | {"positions": np.int32([0, 1, 2, 3])}
    where = {n: P() if n in ("weight_scale", "bias") else P("dp") for n in call}
    spec = KVCache(P("dp"), P("dp"), P(), P(), None, None, None)
    function = step
    if kind != "explicit":
        function = jax.shard_map(
            step, mesh=mesh, in_specs=(spec, where), out_specs=(P("dp"), spec),
            check_vma=kind == "checked",
        )  # fmt: skip
    # A mesh that is set makes JAX's own checkify fail on jax.shard_map.
    with jax.set_mesh(mesh) if kind == "explicit" else contextlib.nullcontext():

        def placed(call):
            return jax.tree.map(
                lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), (cache, call), (spec, where)
            )

        assert error_of(*placed(call), function=function) is None
        lost = error_of(*placed(call | {"positions": np.int32([0, 1, 2, C2])}), function=function)
    assert "2 of 8 tokens" in lost if kind == "explicit" else "2 of 4 tokens" in lost


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_shards_of_the_rows_or_blocks(kind):
    """A token of another device's rows is not lost; one past the end of all of them is."""
    mesh = jax.make_mesh((2,), ("dp",), (AxisType.Auto,))
    cache, call = made(kind)
    codes = P("dp") if kind == "paged" else P(None, "dp")
    spec = type(cache)(codes, codes, P(), P(), P(), P(), None)
    inside, past = ([1, 5, 10], [1, 5, 11])
    if kind == "paged":
        call["block_table"] = np.array([[5, 2, 1], [0, 7, 3], [4, 8, 6]], np.int32)
        inside, past = ([[1, 5], [7, 8], [2, -1]], [[1, 5], [7, 8], [2, 4]])

    def one(cache, call):
        return cache.update(**call, axis_name="dp")[1]

    function = jax.shard_map(one, mesh=mesh, in_specs=(spec, P()), out_specs=spec)
    assert error_of(cache, call | {"positions": np.int32(inside)}, function=function) is None
    error = error_of(cache, call | {"positions": np.int32(past)}, function=function)
    assert "1 of 6 tokens" in error


def test_without_checkify_nothing_is_there():
    """The program is the same as without the rule, and an export of it serialises."""
    cache, call = made("contiguous")
    call |= {"positions": np.int32([0, 1, 99])}
    text = jax.jit(step).lower(cache, call).as_text()
    rules = compat.checkify.error_checks
    rule = rules.pop(primitive.dequant_rope_quant_kvcache_p)
    try:
        assert jax.jit(lambda *a: step(*a)).lower(cache, call).as_text().count("\n") == text.count(
            "\n"
        )
        unchecked = jax.jit(checkify.checkify(lambda *a: step(*a)))
        assert unchecked(cache, call)[0].get() is None, "the rule is what reports"
    finally:
        rules[primitive.dequant_rope_quant_kvcache_p] = rule
    assert "callback" not in text
    exported = jax.export.export(jax.jit(step), disabled_checks=disabled_export_checks())
    assert jax.export.deserialize(exported(cache, call).serialize()).nr_devices == 1
