"""Lowering and exporting for Ascend on a machine without one."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from support import calls, hlo
from support.internals import ascend, ascend_plugin, compat

from jax_kvcache import dequant_rope_quant_kvcache

PLATFORMS = [("ascend",), ("ASCEND",), ("cpu", "ascend", "ASCEND")]


def step(**options):
    function = functools.partial(dequant_rope_quant_kvcache, **options)
    return jax.jit(function, donate_argnames=("k_cache", "v_cache"))


@pytest.mark.parametrize("platforms", PLATFORMS, ids=str)
def test_the_module_has_the_call(platforms):
    traced = step(kv_output=True).trace(**calls.arguments())
    text = traced.lower(lowering_platforms=platforms).as_text()
    lines = [line for line in text.splitlines() if hlo.NATIVE_CALL in line]
    assert len(lines) == len(platforms)
    for line in lines:
        assert "mhlo.backend_config = {kv_output = true}" in line
        for result in (3, 4):
            assert f"output_tuple_indices = [{result}], operand_index = {result}," in line
    assert "tf.aliasing_output = 3" in text
    assert "tf.aliasing_output = 4" in text


def test_no_cache_is_reshaped():
    call = calls.arguments(B=2, C1=2, C2=64)
    text = step().trace(**call).lower(lowering_platforms=("ascend",)).as_text()
    copies = ("reshape", "transpose", "broadcast_in_dim", "concatenate")
    cache = "tensor<2x64x1x64xi8>"
    for line in text.splitlines():
        assert not (cache in line and any(f"stablehlo.{op}" in line for op in copies)), line


def test_a_refused_call_takes_xla_and_says_so():
    traced = step().trace(**calls.arguments(Nq=32, Nkv=8, D=128))
    with pytest.warns(UserWarning, match="on ascend: the operator takes H <= 4096, got H = 6144"):
        text = traced.lower(lowering_platforms=("ascend",)).as_text()
    assert hlo.NATIVE_CALL not in text
    traced = step(implementation="ffi").trace(**calls.arguments(Nq=32, Nkv=8, D=128))
    with pytest.raises(NotImplementedError, match="tensor parallelism over 2 devices fits"):
        traced.lower(lowering_platforms=("ascend",))


@pytest.mark.parametrize("platforms", PLATFORMS, ids=str)
def test_export(platforms):
    target = jax.export.DisabledSafetyCheck.custom_call("dequant_rope_quant_kvcache")
    exported = jax.export.export(step(), platforms=platforms, disabled_checks=[target])
    artifact = exported(**calls.arguments())
    again = jax.export.deserialize(artifact.serialize())
    assert again.platforms == platforms
    assert hlo.NATIVE_CALL in again.mlir_module()


def test_donation_reaches_ascend():
    """Without the shim JAX ignores donation there, with a warning, and copies the caches."""
    traced = step().trace(**calls.arguments())
    assert "tf.aliasing_output" in traced.lower(lowering_platforms=("ascend",)).as_text()
    known = compat.mlir._platforms_with_donation
    assert set(ascend.PLATFORMS) <= set(known)
    compat.enable_donation(ascend.PLATFORMS)
    assert len(known) == len(set(known))
    with pytest.warns(UserWarning, match="Donation is not implemented"):
        traced.lower(lowering_platforms=("unknown",))


def test_x64():
    with jax.enable_x64(True):
        traced = step().trace(**calls.arguments())
        text = traced.lower(lowering_platforms=("ascend",)).as_text()
    line = next(line for line in text.splitlines() if hlo.NATIVE_CALL in line)
    assert "i64>, tensor" not in line.split(") -> ")[0].split(" : (")[1]


def test_no_plugin_here():
    assert ascend_plugin.name() is None
    assert ascend.unavailable() == "this process has no Ascend PJRT plugin"
    assert ascend_plugin.offers()["PJRT FFI extension"].startswith("no Ascend")
    assert ascend.report()["target"] == "not registered: there is no plugin"
    assert jnp.zeros(1).devices().pop().platform == "cpu"


def operations_on_slots(text):
    """The operations, constants and reshapes left out, that make the native call's slots."""
    made_by, names = {}, re.compile(r"%[\w#]+")
    for line in map(str.strip, text.splitlines()):
        if hlo.NATIVE_CALL in line:
            operands = line.split("(", 1)[1].split(")")[0]
            unseen, found = [names.findall(operands)[5]], []
            break
        if match := re.match(r"(%\w+) = \"?(?:stablehlo\.)?(\w+)\"?(.*)", line):
            made_by[match[1]] = match[2], names.findall(match[3].split(" : ")[0])
    while unseen:
        operation, operands = made_by.pop(unseen.pop(), ("constant", []))
        unseen += operands
        found += [operation] * (operation not in ("constant", "reshape"))
    return sorted(found)


SAFE = ["compare", "convert", "select"]


@pytest.mark.parametrize("indices_mode", ["drop", "promise_in_bounds"])
@pytest.mark.parametrize(
    ("sizes", "operations"),
    [
        ({"B": 4, "C1": 4, "S": None}, ["add", *SAFE]),
        ({"B": 4, "C1": 4, "S": 1}, ["add", *SAFE]),
        ({"B": 1, "C1": 1, "S": 1}, SAFE),
        ({"B": 4, "S": None, "cache_mode": "page"}, SAFE),
        ({"B": 4, "S": 1, "cache_mode": "page"}, SAFE),
        ({"B": 2, "S": 7, "cache_mode": "page"}, SAFE),
    ],
    ids=str,
)
def test_the_fewest_operations_that_make_slots_safe(sizes, operations, indices_mode):
    """The operator checks no upper bound; a plugin may launch a kernel for each operation."""
    traced = step(
        cache_mode=sizes.get("cache_mode", "contiguous"), indices_mode=indices_mode
    ).trace(**calls.arguments(**sizes))
    text = traced.lower(lowering_platforms=("ascend",)).as_text()
    assert operations_on_slots(text) == operations
