"""Starts processes with the stand-in device: the sessions of tests/ascend, and lesser machines.

`pytest -m ascend_device` runs on a machine with Ascend hardware, its PJRT plugin and CANN; it is
skipped elsewhere.
"""

import functools
import importlib.util
import json

import jax
import pytest
from support import golden_calls, process
from support.internals import ascend, ascend_plugin

from jax_kvcache import dequant_rope_quant_kvcache

SESSION = process.TESTS / "ascend" / "on_device"
ADDOPTS = "addopts=--import-mode=importlib --strict-markers"
ARTIFACT_CALL = "g02_i32_bf16_contiguous_all"
LIMIT = 500  # seconds that a session may take

needs_standin = pytest.mark.skipif(
    importlib.util.find_spec("xla_plugins") is None,
    reason="the stand-in device needs xla-cpu-pjrt (Linux x86-64)",
)


PUBLIC = {"devices": 8}  # the public plugin, which is the stand-in's default
NEWEST = {
    "devices": 8, "platform_name": "ascend", "jax_hook": "works", "pjrt_extension": False,
    "ffi": "newest", "cann": "8.5",
}  # fmt: skip


def run_session(session, *arguments, **environment):
    command = ["-m", "pytest", "-q", "-o", ADDOPTS, SESSION, *arguments]
    changes = {"ASCEND_SESSION": session, "JAX_PLATFORMS": None}
    process.run(*command, timeout=LIMIT, **changes | environment)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """A donating step, exported on this machine, which has no Ascend plugin."""
    call = golden_calls.load(ARTIFACT_CALL)
    function = functools.partial(dequant_rope_quant_kvcache, **call.options)
    step = jax.jit(function, donate_argnames=("k_cache", "v_cache"))
    check = jax.export.DisabledSafetyCheck.custom_call("dequant_rope_quant_kvcache")
    platforms = ("cpu", *ascend.PLATFORMS)
    exported = jax.export.export(step, platforms=platforms, disabled_checks=[check])
    path = tmp_path_factory.mktemp("artifact") / ARTIFACT_CALL
    path.write_bytes(exported(**call.inputs).serialize())
    return str(path)


@needs_standin
def test_on_the_standin(artifact):
    run_session(json.dumps(PUBLIC), ASCEND_ARTIFACT=artifact)


@needs_standin
def test_on_a_standin_of_the_newest_runtime(artifact):
    # What takes the longest and does not depend on the runtime is left to the first session.
    less = (f"--ignore={SESSION}/test_model.py", "-k", "not vmap and not dtypes and not edges")
    run_session(json.dumps(NEWEST), *less, ASCEND_ARTIFACT=artifact)


@pytest.mark.ascend_device
def test_on_a_device():
    if ascend_plugin.name() is None:
        jax.devices()
    if (reason := ascend.unavailable()) is not None:
        pytest.skip(reason)
    run_session("device")


def machine(fail=(), **arguments):
    program = process.PROGRAMS / "ascend_machine.py"
    written = process.run(program, json.dumps(arguments), *fail, JAX_PLATFORMS=None)
    return json.loads(written.splitlines()[-1])


@needs_standin
def test_a_plugin_that_takes_no_targets():
    found = machine(pjrt_extension=False)
    platform, implementation, reason = found["explain"]
    assert (platform, implementation) == ("ASCEND", "xla")
    assert reason.startswith(
        "the Ascend plugin did not take the FFI target (jax.ffi: the plugin's hook did not take "
        "the target from JAX's queue; PJRT FFI extension: the plugin has no PJRT FFI extension; "
        "compiling: NOT_FOUND: No FFI handler registered for dequant_rope_quant_kvcache"
    )
    assert found["launches"] == 0
    [warning] = found["warnings"]
    assert warning.startswith("dequant_rope_quant_kvcache runs its XLA implementation on ASCEND")
    assert found["report"]["plugin"] == "ASCEND"
    assert found["report"]["target"] == f"not registered: {reason}"


@needs_standin
def test_a_machine_without_cann():
    found = machine(cann=None, platform_name="ascend", jax_hook="none")
    platform, implementation, reason = found["explain"]
    assert (platform, implementation) == ("ascend", "xla")
    assert reason.startswith("CANN was not found: no library with aclnnDequantRopeQuantKvcache.")
    assert found["launches"] == 0
    [warning] = found["warnings"]
    assert "runs its XLA implementation on ascend: CANN was not found" in warning
    assert found["report"]["CANN"] == reason
    assert found["report"]["target"] == "registered: a program with it compiles"
    assert found["report"]["offered through jax.ffi"] == "no plugin takes targets from jax.ffi"


@needs_standin
def test_the_operator_in_a_vendors_package():
    found = machine(cann="vendor")
    assert found["report"]["CANN"].split(", ")[0].endswith("customize/op_api/lib/libcust_opapi.so")
    assert (found["errors"], found["launches"]) == ([], 1)


@needs_standin
def test_a_release_that_cannot_destroy_executors():
    """One leaks when there is no memory for the workspace, which the first error says."""
    found = machine(["scratch", "scratch"], cann="early")
    assert found["report"]["CANN"].endswith("; without aclDestroyAclOpExecutor")
    first, second = found["errors"]
    for error in (first, second):
        assert "scratch memory: the stand-in device is out of memory)." in error
    leak = "This release of CANN has no aclDestroyAclOpExecutor, so each such failure leaks one of "
    assert leak in first
    assert leak not in second
    assert found["launches"] == 1
    assert found["alive"] == {"executor": 2, "int_array": 0, "scratch": 0, "tensor": 0}
    assert found["faults"] == []
