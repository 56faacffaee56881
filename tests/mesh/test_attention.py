"""decode_attention alone over a mesh: derivatives, vmap, and what devices send each other."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import hlo
from support.attention import Call, assert_close, in_float64

from jax_kvcache import decode_attention


class Layout(NamedTuple):
    """Where a cache lies on a mesh of 2 x 2 devices, and where its queries are."""

    kind: str
    codes: P
    queries: P = P()
    heads: str | None = None
    merged: Any = None  # the mesh axes that the rows of a sequence are spread over


LAYOUTS = {
    "sequences": Layout("contiguous", P("dp", None, "tp"), P("dp", None, "tp"), "tp"),
    "rows": Layout("contiguous", P(None, "dp", "tp"), P(None, None, "tp"), "tp", "dp"),
    "blocks": Layout("paged", P("dp", None, "tp"), P(None, None, "tp"), "tp", "dp"),
    "rows, two axes": Layout("contiguous", P(None, ("tp", "dp")), merged=("tp", "dp")),
    "blocks, two axes": Layout("paged", P(("dp", "tp")), merged=("dp", "tp")),
}
B, S, Nq, D = 2, 2, 8, 8
POSITIONS = np.array([[-1, 23], [4, 13]], np.int32)
each_layout = pytest.mark.parametrize("name", LAYOUTS)
each_mode = pytest.mark.parametrize(
    "mode", ["automatic", "explicit", "manual", "manual, unchecked"]
)


def make_mesh(mode="automatic"):
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    return jax.make_mesh((2, 2), ("dp", "tp"), (kind,) * 2)


def drawn(name, **options):
    """q, cache, sinks and positions, and attention as a function of them and of an axis_name."""
    sizes = {"B": B, "S": S, "Nq": Nq, "Nkv": 4, "D": D, "rows": 24, "block": 8, "offset": 9.0}
    q, cache, keywords = Call(kind=LAYOUTS[name].kind, sinks=True, **sizes).draw()
    keywords |= {"soft_cap": 3.0, "return_lse": True} | options
    arguments = (q, cache, keywords.pop("sinks"), POSITIONS)
    del keywords["positions"]

    def attend(q, cache, sinks, positions, axis_name=None):
        where = {"positions": positions, "axis_name": axis_name}
        return decode_attention(q, cache, sinks=sinks, **where, **keywords)

    return arguments, attend


def specs(name, cache):
    """The PartitionSpecs of the arguments."""
    layout = LAYOUTS[name]
    heads = P(layout.heads)
    of_cache = jax.tree.map(lambda a: layout.codes if a.dtype == np.int8 else heads, cache)
    return layout.queries, of_cache, heads, P(*layout.queries[:1])


def place(arguments, where, mesh):
    return jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), arguments, where)


def over_mesh(name, mode, function, arguments):
    """`function(*arguments, axis_name)` on the mesh, compiled, and its placed arguments."""
    mesh, layout, where = make_mesh(mode), LAYOUTS[name], specs(name, arguments[1])
    if mode.startswith("manual"):
        function = jax.shard_map(
            lambda *own, whole=function: whole(*own, layout.merged),
            mesh=mesh, in_specs=where, out_specs=layout.queries,
            check_vma=mode == "manual",
        )  # fmt: skip
    placed = place(arguments, where, mesh)
    return jax.jit(function).lower(*placed).compile(), placed


def tangents_of(attend):
    """The derivatives of both results by all that is a real number, in its own direction."""

    def function(q, cache, sinks, *rest):
        names = ("scale_k", "scale_v", "offset_k", "offset_v")

        def of_numbers(q, sinks, *numbers):
            changed = dataclasses.replace(cache, **dict(zip(names, numbers, strict=True)))
            return attend(q, changed, sinks, *rest)

        numbers = (q, sinks, *(getattr(cache, name) for name in names))
        return jax.jvp(of_numbers, numbers, numbers)

    return function


@each_mode
@each_layout
def test_derivatives_equal_one_devices(name, mode):
    arguments, attend = drawn(name)
    function = tangents_of(attend)
    expected = jax.tree.map(np.asarray, jax.jit(function)(*arguments))
    compiled, placed = over_mesh(name, mode, function, arguments)
    result = compiled(*placed)
    assert np.abs(expected[1][0]).max() > 0.1
    assert np.isfinite(expected[1][1]).all(), "also where nothing is seen"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), result, expected)


@each_mode
@each_layout
def test_vmap_equals_a_loop(name, mode):
    """Over q and positions; the cache is shared."""
    (q, cache, sinks, positions), attend = drawn(name)

    def both(q, cache, sinks, positions, *rest):
        one = lambda q, positions: attend(q, cache, sinks, positions, *rest)  # noqa: E731
        stacked = jnp.stack([q, 2 * q]), jnp.stack([positions, positions - 5])
        out, lse = jax.vmap(one)(*stacked)
        return out[0], out[1], lse[0], lse[1]

    compiled, placed = over_mesh(name, mode, both, (q, cache, sinks, positions))
    out, other_out, lse, other_lse = compiled(*placed)
    for result, expected in (
        ((out, lse), attend(q, cache, sinks, positions)),
        ((other_out, other_lse), attend(2 * q, cache, sinks, positions - 5)),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), result, expected)


@pytest.mark.parametrize("mode", ["automatic", "explicit"])
@pytest.mark.parametrize("over", ["dp", None])
def test_vmap_over_v_alone(over, mode):
    """K, which all examples share, lies as V does without the examples."""
    (q, cache, _, positions), _ = drawn("sequences")
    values = jnp.stack([cache.v_cache, -cache.v_cache])
    mesh = make_mesh(mode)
    codes = P(None, None, "tp") if over else P("dp", None, "tp")
    placed = [
        jax.device_put(a, NamedSharding(mesh, spec))
        for a, spec in ((cache.k_cache, codes), (values, P(over, *codes)))
    ]
    cache = jax.device_put(cache, NamedSharding(mesh, P()))

    def attend(k, v):
        own = dataclasses.replace(cache, k_cache=k, v_cache=v)
        return decode_attention(q, own, positions=positions)

    out = jax.jit(jax.vmap(attend, in_axes=(None, 0)))(*placed)
    for one, v in zip(np.asarray(out), np.asarray(values), strict=True):
        alone = jax.device_put((np.asarray(cache.k_cache), v), jax.devices()[0])
        whole = jax.tree.map(np.asarray, cache)
        whole = dataclasses.replace(whole, k_cache=alone[0], v_cache=alone[1])
        expected = decode_attention(np.asarray(q), whole, positions=positions)
        np.testing.assert_allclose(one, expected, atol=2e-5)


@pytest.mark.parametrize("mode", ["automatic", "explicit"])
def test_axes_of_one_device_are_none(mode):
    """A mesh of another shape may have them: rows with a window, and D."""
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 1), ("dp", "tp"), (kind,) * 2)
    q, cache, keywords = Call(kind="paged", B=2, rows=24, block=8).draw()
    keywords = {n: a for n, a in keywords.items() if a is not None} | {"window": 5}
    expected = decode_attention(q, cache, **keywords)
    for spec in (P("dp", "tp"), P("dp", None, None, "tp")):
        own = {
            n: jax.device_put(getattr(cache, n), NamedSharding(mesh, spec))
            for n in ("k_cache", "v_cache")
        }
        placed = jax.device_put((q, cache), NamedSharding(mesh, P()))
        placed = (placed[0], dataclasses.replace(placed[1], **own))
        out = jax.jit(lambda q, cache: decode_attention(q, cache, **keywords))(*placed)
        np.testing.assert_allclose(out, expected, atol=2e-5)


ONE_KV_HEAD = {
    "sequences": ("contiguous", P("dp")),
    "rows": ("contiguous", P(None, ("dp", "tp"))),
    "nothing": ("contiguous", P()),
    "blocks": ("paged", P(("dp", "tp"))),
}


@pytest.mark.parametrize("mode", ["automatic", "explicit"])
@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize("of_q", [P(), P(None, None, "tp"), P("dp", None, "tp")], ids=str)
@pytest.mark.parametrize("name", ONE_KV_HEAD)
def test_one_kv_head(name, of_q, implementation, mode):
    """Every device has it, and the heads of q may be sharded all the same."""
    kind, codes = ONE_KV_HEAD[name]
    call = Call(kind=kind, B=B, S=S, Nq=Nq, Nkv=1, D=D, rows=24, sinks=True)
    q, cache, keywords = call.draw()
    of_cache = jax.tree.map(lambda a: codes if a.dtype == np.int8 else P(), cache)
    placed = place((q, cache), (of_q, of_cache), make_mesh(mode))

    def attend(q, cache):
        options = {"return_lse": True, "implementation": implementation}
        return decode_attention(q, cache, **keywords, **options)

    out, lse = jax.jit(attend)(*placed)
    expected, expected_lse, score, value = in_float64(q, cache, **keywords)
    assert_close(out, expected, value, score)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@each_mode
@each_layout
def test_what_moves(name, mode):
    """One maximum and one sum where the rows of a sequence are spread, and else nothing."""
    arguments, attend = drawn(name)
    compiled, _ = over_mesh(name, mode, attend, arguments)
    heads = Nq // (2 if LAYOUTS[name].heads else 1)
    merged = 4 * B * S * heads * (1 + D + 1) if LAYOUTS[name].merged else 0
    assert hlo.collective_bytes(compiled.as_text()) == merged
    assert len(hlo.collectives(compiled.as_text())) == (2 if merged else 0)
