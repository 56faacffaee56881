"""explain says what runs, and a demand for a native target that is not there is refused."""

import jax
import numpy as np
import pytest
from support import calls, hlo

from jax_kvcache import dequant_rope_quant_kvcache, explain


def test_xla_is_asked_for():
    answer = explain(**calls.arguments(), implementation="xla")
    assert answer == ("cpu", "xla", "asked for")


def test_it_takes_what_the_operator_takes():
    call = calls.ones(B=2, S=3, Nq=1, Nkv=1, D=64)
    for options in (
        {"size_splits": np.array([64, 64, 64], np.int8)},
        {"size_splits": iter((64, 64, 64))},
        {"kv_output": np.bool_(True)},
        {"cache_mode": np.str_("contiguous"), "implementation": np.str_("xla")},
    ):
        assert explain(**call, **options).platform == "cpu"
    assert dequant_rope_quant_kvcache(**call, size_splits=iter((64, 64, 64))).q.shape[2] == 1


def test_platform_is_a_name():
    with pytest.raises(TypeError, match="`platform` must be a str, got 5"):
        explain(**calls.arguments(), platform=5)


@pytest.mark.parametrize("platform", ["rocm", "tpu"])
def test_platform_without_a_native_target(platform):
    answer = explain(**calls.arguments(), platform=platform)
    assert answer.implementation == "xla"
    assert f"no native target for platform '{platform}'" in answer.reason
    demanded = explain(**calls.arguments(), platform=platform, implementation="ffi")
    assert demanded.implementation is None
    assert "raises NotImplementedError" in str(demanded)


@pytest.mark.parametrize("platform", ["rocm", "tpu"])
def test_lowering_does_what_explain_says(platform):
    def lower(implementation):
        function = jax.jit(
            lambda call: dequant_rope_quant_kvcache(**call, implementation=implementation)
        )
        return function.trace(calls.arguments()).lower(lowering_platforms=(platform,)).as_text()

    assert "stablehlo.scatter" in lower(None)
    assert hlo.NATIVE_CALL not in lower(None)
    with pytest.raises(NotImplementedError, match=f"no native target for platform '{platform}'"):
        lower("ffi")
