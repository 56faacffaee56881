"""The stand-in device is never switched on by accident, and says what it needs."""

import importlib.util

import jax
import pytest
from support import process
from support.internals import compat, standin_build

from jax_kvcache import testing


@pytest.fixture
def unstarted(monkeypatch):
    """As if JAX had not started."""
    monkeypatch.setattr(compat, "backends_are_initialized", lambda: False)


def test_jax_has_started():
    jax.devices()
    with pytest.raises(RuntimeError, match="JAX has already started its backends: call `enable_as"):
        testing.enable_ascend_standin()


def test_platforms_leave_it_out(unstarted, monkeypatch):
    monkeypatch.setattr(testing, "_chosen_platforms", lambda: "cpu")
    with pytest.raises(RuntimeError, match="JAX_PLATFORMS=cpu leaves the stand-in out"):
        testing.enable_ascend_standin()


def test_a_real_plugin_is_not_replaced(unstarted, monkeypatch):
    monkeypatch.setattr(compat, "plugin_api", lambda name: object())
    with pytest.raises(RuntimeError, match="An Ascend plugin is installed: the stand-in does not"):
        testing.enable_ascend_standin()


def test_without_the_cpu_plugin(unstarted, monkeypatch):
    monkeypatch.setattr(testing, "_chosen_platforms", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r'pip install "jax-kvcache\[standin\]"'):
        testing.enable_ascend_standin()


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(standin_build.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match="compiled on first use: install g"):
        standin_build.compiler()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"platform_name": "cann"}, r"`platform_name` must be one of .'ASCEND', 'asc.*got 'cann'"),
        ({"jax_hook": "http"}, "`jax_hook` must be one of .'one_argument', 'works', 'none'., got"),
        ({"ffi": "0.3"}, "`ffi` must be one of .'0.2', 'newest'., got '0.3'"),
        ({"cann": "7.0"}, "`cann` must be one of .'8.0', .*, 'idle', None., got '7.0'"),
        ({"devices": 0}, "`devices` must be 1 or more, got 0"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        testing.enable_ascend_standin(**options)


def test_importing_switches_nothing_on():
    code = "import jax, jax_kvcache.testing; print(jax.default_backend())"
    assert process.run("-c", code) == "cpu\n"
