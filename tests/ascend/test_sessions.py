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
from support.internals import ascend

from jax_kvcache import dequant_rope_quant_kvcache

SESSION = process.TESTS / "ascend" / "on_device"
ADDOPTS = "addopts=--import-mode=importlib --strict-markers"
ARTIFACT_CALL = "g02_i32_bf16_contiguous_all"
LIMIT = 500  # seconds that a session may take

needs_standin = pytest.mark.skipif(
    importlib.util.find_spec("xla_plugins") is None,
    reason="the stand-in device needs xla-cpu-pjrt (Linux x86-64)",
)


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
    run_session("ascend jax", ASCEND_ARTIFACT=artifact)


@needs_standin
def test_on_the_standin_in_upper_case(artifact):
    ignored = f"--ignore={SESSION}/test_model.py"  # the model's compiling takes the longest
    run_session("ASCEND pjrt", ignored, ASCEND_ARTIFACT=artifact)


@pytest.mark.ascend_device
def test_on_a_device():
    if ascend.plugin() is None:
        jax.devices()
    if (reason := ascend.unavailable()) is not None:
        pytest.skip(reason)
    run_session("device")


def machine(**arguments):
    program = process.PROGRAMS / "ascend_machine.py"
    written = process.run(program, json.dumps(arguments), JAX_PLATFORMS=None)
    return json.loads(written.splitlines()[-1])


@needs_standin
def test_a_plugin_that_takes_no_targets():
    found = machine(routes=[])
    platform, implementation, reason = found["explain"]
    assert (platform, implementation) == ("ascend", "xla")
    assert reason == (
        "the Ascend plugin did not take the FFI target (jax.ffi: no plugin takes targets from "
        "jax.ffi; PJRT FFI extension: the plugin has no PJRT FFI extension)"
    )
    assert found["launches"] == 0
    [warning] = found["warnings"]
    assert warning.startswith("dequant_rope_quant_kvcache runs its XLA implementation on ascend")
    assert found["report"]["plugin"] == "ascend"


@needs_standin
def test_a_machine_without_cann():
    found = machine(cann=False, platform_name="ASCEND")
    platform, implementation, reason = found["explain"]
    assert (platform, implementation) == ("ASCEND", "xla")
    assert reason.startswith("CANN was not found: no library with aclnnDequantRopeQuantKvcache.")
    assert found["launches"] == 0
    [warning] = found["warnings"]
    assert "runs its XLA implementation on ASCEND: CANN was not found" in warning
    assert found["report"]["CANN"] == reason
