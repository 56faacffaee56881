"""The stand-in refuses what the real runtime and CANN refuse, each rule asked for by itself."""

import contextlib
import ctypes
import subprocess

import jax
import jax.numpy as jnp
import pytest
from support import process
from support.internals import compat, pjrt, standin_build

NULLPTR, INNER_NULLPTR = 161001, 561103


@pytest.fixture(scope="module")
def scratch_target(tmp_path_factory):
    """A target that says what scratch memory it was given."""
    path = tmp_path_factory.mktemp("handler") / "ask_for_scratch.so"
    source = process.PROGRAMS / "ask_for_scratch.cc"
    command = [standin_build.compiler(), "-std=c++17", "-shared", "-fPIC", "-o", path, source]
    subprocess.run([*command, "-isystem", jax.ffi.include_dir()], check=True)
    handler = jax.ffi.pycapsule(ctypes.CDLL(str(path)).ask_for_scratch)
    with contextlib.suppress(TypeError):  # what the public plugin's hook raises
        jax.ffi.register_ffi_target("ask_for_scratch", handler, platform="ascend")
    pjrt.register_handler(
        compat.plugin_api("ascend"), "ask_for_scratch", pjrt.capsule_pointer(handler), "ascend"
    )
    return "ask_for_scratch"


def test_scratch_memory_is_aligned_to_16_and_no_more(scratch_target, standin):
    byte = jax.ShapeDtypeStruct((1,), jnp.int8)
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError)) as raised:
        jax.block_until_ready(jax.ffi.ffi_call(scratch_target, byte)(jnp.zeros(1, jnp.int8)))
    refused = [f"{alignment}: Unsupported alignment: {alignment}" for alignment in (24, 32, 512)]
    assert str(raised.value).split("UNAVAILABLE: ")[1].strip("; ").split("; ") == [
        "0: Unsupported alignment: 0", "1: at 16 modulo 512", "16: at 16 modulo 512", *refused,
    ]  # fmt: skip


@pytest.fixture
def cann(standin):
    return ctypes.CDLL(str(standin.toolkit / "libopapi.so"))


@pytest.fixture
def failed_executor(cann):
    """What a first call that fails leaves behind."""
    executor, size = ctypes.c_void_p(), ctypes.c_uint64()
    absent = [None] * 21
    call = cann.aclnnDequantRopeQuantKvcacheGetWorkspaceSize
    assert call(*absent, ctypes.byref(size), ctypes.byref(executor)) == NULLPTR
    assert executor.value is not None
    return executor


@pytest.mark.parametrize(
    ("function", "status", "fault"),
    [
        ("aclDestroyAclOpExecutor", INNER_NULLPTR, "destroyed a executor that is not alive"),
        (
            "aclSetAclOpExecutorRepeatable",
            INNER_NULLPTR,
            "made an executor repeatable that is not alive",
        ),
        ("aclnnDequantRopeQuantKvcache", NULLPTR, "launched an executor that is not alive"),
    ],
)
def test_an_executor_of_a_failed_call_must_not_be_touched(
    function, status, fault, cann, failed_executor, standin
):
    base = ctypes.CDLL(str(standin.toolkit / "libnnopbase.so"))
    if function == "aclnnDequantRopeQuantKvcache":
        assert cann[function](None, ctypes.c_uint64(0), failed_executor, None) == status
    else:
        assert base[function](failed_executor) == status
    assert standin.ledger()["faults"] == [fault]
    standin.reset()
