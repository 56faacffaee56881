"""explain says what runs, and a demand for a native target that is not there is refused."""

import calls
import jax
import pytest

import jax_kvcache
from jax_kvcache import dequant_rope_quant_kvcache, explain


def test_xla_is_asked_for():
    answer = explain(**calls.arguments(), implementation="xla")
    assert answer == ("cpu", "xla", "asked for")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_platform_without_a_native_target(platform):
    answer = explain(**calls.arguments(), platform=platform)
    assert answer.implementation == "xla"
    assert f"no native target for platform '{platform}'" in answer.reason
    demanded = explain(**calls.arguments(), platform=platform, implementation="ffi")
    assert demanded.implementation is None
    assert "raises NotImplementedError" in str(demanded)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowering_does_what_explain_says(platform):
    def lower(implementation):
        function = jax.jit(
            lambda call: dequant_rope_quant_kvcache(**call, implementation=implementation)
        )
        return function.trace(calls.arguments()).lower(lowering_platforms=(platform,)).as_text()

    assert "stablehlo.scatter" in lower(None)
    assert jax_kvcache._ffi.TARGET + '"' not in lower(None)
    with pytest.raises(NotImplementedError, match=f"no native target for platform '{platform}'"):
        lower("ffi")
