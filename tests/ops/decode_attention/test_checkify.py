"""checkify reports queries past the end and missing blocks; elsewhere nothing of that is there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.attention import Call
from support.internals import attention_primitive, compat

from jax_kvcache import decode_attention, disabled_export_checks

each_kind = pytest.mark.parametrize("kind", ["contiguous", "paged"])
INSIDE = np.array([[38, 39], [-1, 0], [-(2**31), -1]], np.int32)  # of 40 rows


def error_of(function, *arguments, errors=checkify.user_checks):
    error, _ = jax.jit(checkify.checkify(function, errors=errors))(*arguments)
    return error.get()


def drawn(kind="contiguous", **sizes):
    """A call of 3 sequences of 2 queries over 40 rows, and what is called."""
    q, cache, keywords = Call(kind=kind, **sizes).draw()
    keywords["positions"] = INSIDE
    return lambda changed: decode_attention(q, cache, **keywords | changed), keywords


def check(error, message):
    if message is None:
        assert error is None
        return
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)


POSITIONS = {  # of one query, and the error's message or None
    "inside": (INSIDE, None),
    "one past": ([[38, 39], [-1, 40], [3, 2]], r"1 of 5 queries .* query 1 of sequence 1, at posit"
                                               r"ion 40 of 40 rows \(with `lengths`"),
    "all past": ([[41, 43]] * 3, "6 of 6 queries .* query 0 of sequence 0, at position 41 of 40"),
    "far past": ([[0, 1], [2, 2], [2**31 - 1, -1]],
                 "1 of 5 queries .* query 0 of sequence 2, at position 2147483647 of 40 rows"),
}  # fmt: skip


@each_kind
@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("case", POSITIONS)
def test_queries_past_the_end(case, layers, kind):
    positions, message = POSITIONS[case]
    attend, _ = drawn(kind, layers=layers)
    check(error_of(attend, {"positions": np.array(positions, np.int32)}), message)


@each_kind
def test_lengths(kind):
    attend, _ = drawn(kind)

    def of(lengths):
        return error_of(attend, {"positions": None, "lengths": np.array(lengths, np.int32)})

    assert of([40, 1, 0]) is None
    check(of([40, 41, -5]), "1 of 4 queries .* query 1 of sequence 1, at position 40 of 40 rows")


HOLES = {  # entries of the block table that are not there, of 5 of 8 rows; options; the message
    "not needed": ({(1, 1): -1, (2, 0): 99}, {}, None),
    "needed": ({(0, 3): -1, (1, 0): 17, (2, 0): -1}, {},
               "the queries .* need 6 blocks, of which 2 are not there: .* none of the cache's 17"
               " blocks, .* entry 3 of sequence 0, for rows 24 and on"),
    "before the window": ({(0, 0): -1, (0, 3): -1}, {"window": 7}, None),
    "in the window": ({(0, 0): -1, (0, 3): -1}, {"window": 8},
                      "need 3 blocks, of which 1 .* entry 3 of sequence 0"),
    "a part": ({(0, 3): -1}, {"return_lse": True}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", HOLES)
def test_missing_blocks(case):
    holes, options, message = HOLES[case]
    attend, keywords = drawn("paged")
    table = keywords["block_table"].copy()
    for where, number in holes.items():
        table[where] = number
    check(error_of(lambda t: attend({"block_table": t} | options), table), message)


@each_kind
def test_a_layer_that_does_not_exist(kind):
    attend, _ = drawn(kind, layers=2)
    assert error_of(attend, {"layer": jnp.int32(1)}) is None
    check(error_of(attend, {"layer": jnp.int32(2)}), "of which .* or the layer does not exist")


@pytest.mark.parametrize("errors", ["user_checks", "index_checks", "float_checks", "all_checks"])
def test_which_checks_report_it(errors):
    attend, keywords = drawn("paged")
    for wrong in ({"positions": INSIDE + 1}, {"block_table": 0 * keywords["block_table"] - 1}):
        found = error_of(attend, wrong, errors=getattr(checkify, errors))
        assert (found is not None) == (errors != "float_checks")


@each_kind
def test_vmap_and_scan(kind):
    attend, _ = drawn(kind)
    many = np.stack([INSIDE, INSIDE + 1])

    def mapped(many):
        return jax.vmap(lambda positions: attend({"positions": positions}))(many)

    def scanned(many):
        return jax.lax.scan(lambda _, p: (None, attend({"positions": p})), None, many)

    check(error_of(mapped, many), "1 of 8 queries .* query 1 of sequence 3, at position 40 of 40")
    check(error_of(scanned, many), "1 of 5 queries .* query 1 of sequence 0, at position 40 of 40")
    assert error_of(mapped, np.stack([INSIDE] * 2)) is None


@each_kind
@pytest.mark.parametrize("mode", ["checked", "unchecked", "explicit"])
def test_over_devices(mode, kind):
    axis_type = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2,), ("dp",), (axis_type,))
    q, cache, keywords = Call(kind=kind, B=4).draw()
    table = keywords.get("block_table")
    positions = np.array([[0, 1], [38, 39], [-1, -1], [5, 6]], np.int32)
    codes = P("dp") if kind == "contiguous" else P()
    spec = type(cache)(codes, codes, P(), P(), None, None, None)
    specs = (P("dp"), spec, P("dp"), None if table is None else P("dp"))

    def attend(q, cache, positions, table):
        return decode_attention(q, cache, positions=positions, block_table=table)

    function = attend
    if mode != "explicit":
        function = jax.shard_map(
            attend, mesh=mesh, in_specs=specs, out_specs=P("dp"), check_vma=mode == "checked"
        )

    def run(positions):
        arguments = (q, cache, positions, table)
        if mode != "explicit":
            return error_of(function, *arguments)
        with jax.set_mesh(mesh):
            place = lambda a, s: jax.device_put(a, NamedSharding(mesh, s))  # noqa: E731
            return error_of(function, *jax.tree.map(place, arguments, specs))

    assert run(positions) is None
    counted = "2 of 6" if mode == "explicit" else "[12] of [24]"
    check(run(positions + np.array([[0], [2], [0], [0]], np.int32)), f"{counted} queries")


@each_kind
@pytest.mark.parametrize("check_vma", [True, False])
def test_rows_or_blocks_over_devices(check_vma, kind):
    """Another device's rows and blocks are there; what no device has is not."""
    mesh = jax.make_mesh((2,), ("dp",), (AxisType.Auto,))
    q, cache, keywords = Call(kind=kind, rows=48).draw()
    table = keywords.get("block_table")
    blocks = len(cache.k_cache)
    codes = P(None, "dp")
    if kind == "paged":  # 20 blocks, of which each device has 10
        codes, blocks = P("dp"), blocks - blocks % 2
        assert table.max() < blocks
    spec = type(cache)(codes, codes, P(), P(), None, None, None)

    def attend(cache, positions, table):
        return decode_attention(q, cache, positions=positions, block_table=table, axis_name="dp")

    function = jax.shard_map(
        attend, mesh=mesh, in_specs=(spec, P(), P()), out_specs=P(), check_vma=check_vma
    )
    positions = np.array([[0, 47], [-1, 23], [24, -(2**31)]], np.int32)
    assert error_of(function, cache, positions, table) is None
    positions[0, 1] = 48
    check(error_of(function, cache, positions, table), "1 of 4 queries .* position 48 of 48 rows")
    positions[0, 1] = 47
    if kind == "paged":
        for number in (-1, blocks):
            table[0, 4] = number
            message = f"need 13 blocks, of which 1 .* cache's {blocks} blocks, .* entry 4 of seque"
            check(error_of(function, cache, positions, table), message)


def test_no_queries():
    q, cache, _ = Call(S=0).draw()
    assert error_of(lambda q: decode_attention(q, cache, np.zeros(3, np.int32)), q) is None


@each_kind
def test_without_checkify_nothing_is_there(kind):
    """No check is in the program, and an export of it serialises."""
    attend, _ = drawn(kind)
    past = {"positions": INSIDE + 1}
    assert "check" not in str(jax.make_jaxpr(attend)(past))
    assert "callback" not in jax.jit(attend).lower(past).as_text()
    exported = jax.export.export(jax.jit(attend), disabled_checks=disabled_export_checks())(past)
    assert jax.export.deserialize(exported.serialize()).nr_devices == 1
    rules = compat.checkify.error_checks
    rule = rules.pop(attention_primitive.decode_attention_p)
    try:
        assert error_of(functools.partial(attend), past) is None, "the rule is what reports"
    finally:
        rules[attention_primitive.decode_attention_p] = rule
