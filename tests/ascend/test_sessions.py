"""Starts processes with the stand-in device: the sessions of tests/ascend, and lesser machines.

`pytest -m ascend_device` runs on a machine with Ascend hardware, its PJRT plugin and CANN; it is
skipped elsewhere.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest
from support import golden_calls

from jax_kvcache import _ascend, dequant_rope_quant_kvcache

TESTS = Path(__file__).parents[1]
SESSION = "tests/ascend/on_device"
ADDOPTS = "addopts=--import-mode=importlib --strict-markers"
ARTIFACT_CALL = "g02_i32_bf16_contiguous_all"

needs_standin = pytest.mark.skipif(
    importlib.util.find_spec("xla_plugins") is None,
    reason="the stand-in device needs xla-cpu-pjrt (Linux x86-64)",
)


def run(command, **environment):
    clean = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    path = os.pathsep.join(p for p in (str(TESTS), clean.get("PYTHONPATH")) if p)
    done = subprocess.run(
        [sys.executable, *command],
        env=clean | {"PYTHONPATH": path} | environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
    return done.stdout


def run_session(session, *arguments, **environment):
    command = [
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=--import-mode=importlib --strict-markers",
        "tests/ascend/on_device",
        *arguments,
    ]
    return run(command, ASCEND_SESSION=session, **environment)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """A donating step, exported on this machine, which has no Ascend plugin."""
    call = golden_calls.load(ARTIFACT_CALL)
    function = functools.partial(dequant_rope_quant_kvcache, **call.options)
    step = jax.jit(function, donate_argnames=("k_cache", "v_cache"))
    check = jax.export.DisabledSafetyCheck.custom_call("dequant_rope_quant_kvcache")
    platforms = ("cpu", *_ascend.PLATFORMS)
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
    if _ascend.plugin() is None:
        jax.devices()
    if (reason := _ascend.unavailable()) is not None:
        pytest.skip(reason)
    run_session("device")


MACHINE = """
    import json, warnings
    from jax_kvcache import testing
    standin = testing.enable_ascend_standin({arguments})
    import jax, jax_kvcache
    from support import calls
    from jax_kvcache import _ascend
    call = calls.ones()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.block_until_ready(jax.jit(jax_kvcache.dequant_rope_quant_kvcache)(**call))
    print(json.dumps(dict(
        explain=jax_kvcache.explain(**call),
        launches=standin.launches,
        warnings=[str(w.message) for w in caught],
        report=_ascend.report(),
    )))
"""


def machine(arguments, **environment):
    code = textwrap.dedent(MACHINE.format(arguments=arguments))
    return json.loads(run(["-c", code], **environment).splitlines()[-1])


@needs_standin
def test_a_plugin_that_takes_no_targets():
    found = machine("routes=()")
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
    found = machine("cann=False, platform_name='ASCEND'")
    platform, implementation, reason = found["explain"]
    assert (platform, implementation) == ("ASCEND", "xla")
    assert reason.startswith("CANN was not found: no library with aclnnDequantRopeQuantKvcache.")
    assert found["launches"] == 0
    [warning] = found["warnings"]
    assert "runs its XLA implementation on ASCEND: CANN was not found" in warning
    assert found["report"]["CANN"] == reason
