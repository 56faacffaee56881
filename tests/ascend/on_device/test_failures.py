"""Every call of CANN made to fail: an error that says what and what to do, and nothing leaks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import calls

from jax_kvcache import dequant_rope_quant_kvcache, testing

CACHES = ("k_cache", "v_cache")
GET_WORKSPACE_SIZE = "aclnnDequantRopeQuantKvcacheGetWorkspaceSize"
LAUNCH = "aclnnDequantRopeQuantKvcache"
ERRORS = (jax.errors.JaxRuntimeError, ValueError)  # jit's fast path raises the second

# What fails (function, status, calls that succeed first), and the error's text.
FAILURES = [
    ([("aclCreateTensor", 1, 0)], r"aclCreateTensor\(`x`\) returned null: EZ9999: injected"),
    ([("aclCreateTensor", 1, 4)], r"aclCreateTensor\(`v_cache`\) returned null: EZ9999"),
    ([("aclCreateTensor", 1, 11)], r"aclCreateTensor\(`v`\) returned null: EZ9999"),
    ([("aclCreateIntArray", 1, 0)], r"aclCreateIntArray\(`size_splits`\) returned null: EZ9999"),
    ([(GET_WORKSPACE_SIZE, 561002, 0)], "561002 .ACLNN_ERR_INNER_TILING_ERROR.: EZ9999"),
    ([(LAUNCH, 361001, 0)], f"{LAUNCH} failed with 361001 .ACLNN_ERR_RUNTIME_ERROR.: EZ9999"),
    ([("aclDestroyTensor", 561103, 0)], "aclDestroyTensor failed with 561103 .ACLNN_ERR_INNER_NUL"),
    ([("aclDestroyTensor", 561103, 11)], "aclDestroyTensor failed with 561103"),
    ([("aclDestroyIntArray", 561000, 0)], "aclDestroyIntArray failed with 561000 .ACLNN_ERR_INNER"),
    (
        [("scratch", 1, 0)],
        r"workspace of 16777216 bytes could not be allocated on the device \(Failed to allocate "
        r"scratch memory: the stand-in device is out of memory\)\. Caches donated",
    ),
    (
        [("scratch", 1, 0), ("aclSetAclOpExecutorRepeatable", 561000, 0)],
        r"stand-in device is out of memory\)\. Then aclSetAclOpExecutorRepeatable failed with",
    ),
    (
        [("scratch", 1, 0), ("aclDestroyAclOpExecutor", 561000, 0)],
        r"stand-in device is out of memory\)\. Then aclDestroyAclOpExecutor failed with 561000",
    ),
    (
        [(LAUNCH, 561000, 0), ("aclGetRecentErrMsg", 1, 0)],
        r"failed with 561000 .ACLNN_ERR_INNER.\. Caches donated",
    ),
]
STATUSES = [
    (161001, "ACLNN_ERR_PARAM_NULLPTR", "INVALID_ARGUMENT", "requires an argument"),
    (161002, "ACLNN_ERR_PARAM_INVALID", "INVALID_ARGUMENT", "refuses a dtype or a shape"),
    (361001, "ACLNN_ERR_RUNTIME_ERROR", "INTERNAL", "npu-smi info"),
    (561000, "ACLNN_ERR_INNER", "INTERNAL", ""),
    (561001, "ACLNN_ERR_INNER_INFERSHAPE_ERROR", "INTERNAL", ""),
    (561002, "ACLNN_ERR_INNER_TILING_ERROR", "INTERNAL", ""),
    (561003, "ACLNN_ERR_INNER_FIND_KERNEL_ERROR", "INTERNAL", "Atlas A2, 800I A2 or A3"),
    (561101, "ACLNN_ERR_INNER_CREATE_EXECUTOR", "INTERNAL", ""),
    (561102, "ACLNN_ERR_INNER_NOT_TRANS_EXECUTOR", "INTERNAL", ""),
    (561103, "ACLNN_ERR_INNER_NULLPTR", "INTERNAL", ""),
    (561107, "ACLNN_ERR_INNER_OPP_PATH_NOT_FOUND", "INTERNAL", "set_env.sh"),
    (561112, "ACLNN_ERR_INNER_OPP_KERNEL_PKG_NOT_FOUND", "INTERNAL", "Ascend-cann-kernels"),
    (999999, "unknown status", "INTERNAL", ""),
]


@functools.cache
def steps():
    operator = functools.partial(dequant_rope_quant_kvcache, implementation="ffi")
    return jax.jit(operator), jax.jit(operator, donate_argnames=CACHES)


def run(donate, call):
    return jax.block_until_ready(steps()[donate](**call))


def test_the_table_has_every_function():
    failing = {name for failures, _ in FAILURES for name, _, _ in failures}
    assert failing == {*testing.FUNCTIONS, "scratch"}


@pytest.mark.parametrize("donate", [False, True], ids=["undonated", "donated"])
@pytest.mark.parametrize(("failures", "text"), FAILURES, ids=lambda v: str(v)[:60])
def test_failure(failures, text, donate, standin):
    call = calls.ones()
    before = {name: np.asarray(call[name]) for name in CACHES}
    for function, status, skip in failures:
        standin.fail(function, status=status, skip=skip)
    with pytest.raises(ERRORS, match=text) as raised:
        run(donate, call)
    assert "Caches donated to this call are deleted; others are unchanged." in str(raised.value)
    for name in CACHES:
        assert call[name].is_deleted() == donate
        if not donate:
            np.testing.assert_array_equal(np.asarray(call[name]), before[name])
    fresh = calls.ones()
    assert (np.asarray(run(donate, fresh).k_cache) != before["k_cache"]).any()


@pytest.mark.parametrize(("status", "name", "code", "advice"), STATUSES, ids=lambda v: str(v)[:40])
def test_status(status, name, code, advice, standin):
    standin.fail(GET_WORKSPACE_SIZE, status=status)
    with pytest.raises(ERRORS) as raised:
        run(False, calls.ones())
    message = str(raised.value)
    assert message.startswith(f"{code}: dequant_rope_quant_kvcache: ")
    wanted = f"{GET_WORKSPACE_SIZE} failed with {status} ({name}): EZ9999: injected failure of"
    assert wanted in message
    assert advice in message


def target(aliases=((3, 3), (4, 4)), **changes):
    """The FFI target called directly, past the lowering's checks."""
    operands = {
        "x": jnp.ones((2, 1, 256), jnp.float16), "cos": jnp.ones(2 * 1 * 64, jnp.float16),
        "sin": jnp.ones(2 * 1 * 64, jnp.float16), "k_cache": jnp.zeros((2, 8, 1, 64), jnp.int8),
        "v_cache": jnp.zeros((2, 8, 1, 64), jnp.int8), "slots": jnp.zeros((2, 1), jnp.int32),
        "scale_k": jnp.ones((1, 1, 64)), "scale_v": jnp.ones((1, 1, 64)),
    } | changes  # fmt: skip
    cache, dtype = operands["k_cache"], operands["cos"].dtype
    results = [
        jax.ShapeDtypeStruct((2 * 1 * 2 * 64,), dtype),
        *[jax.ShapeDtypeStruct((0,), dtype)] * 2,
        *[jax.ShapeDtypeStruct(cache.shape, jnp.int8)] * 2,
    ]
    function = jax.ffi.ffi_call(
        "dequant_rope_quant_kvcache", results, input_output_aliases=dict(aliases)
    )
    absent = [jnp.zeros((0,), jnp.float32)] * 5
    return jax.block_until_ready(
        jax.jit(lambda *a: function(*a, kv_output=False))(*operands.values(), *absent)
    )


def test_the_handler_checks_for_itself(standin):
    target()
    tables = {name: jnp.ones(2 * 1 * 64, jnp.float32) for name in ("cos", "sin")}
    with pytest.raises(ERRORS, match=r"`cos` must have dtype float16 or bfloa"):
        target(x=jnp.ones((2, 1, 256), jnp.float32), **tables)
    with pytest.raises(ERRORS, match="must be shared by all groups on Ascend"):
        target(scale_k=jnp.ones((2, 1, 64)))
    with pytest.raises(ERRORS, match="`scale_k` must have shape"):
        target(scale_k=jnp.ones((1, 1, 32)))
    with pytest.raises(ERRORS, match="`v_cache` must be the memory of its result"):
        target(aliases=((3, 3),))
    assert standin.launches == 1


def test_unknown_function(standin):
    with pytest.raises(ValueError, match="`function` must be one of"):
        standin.fail("aclrtMalloc")
