"""What is said of the device: the plugin, the ways that took the target, CANN's files."""

import re

import jax
import pytest
from support import ascend_session
from support.ascend_session import NAME, ROUTES
from support.internals import ascend, backends

from jax_kvcache import testing


@pytest.mark.ascend_device
def test_available():
    assert jax.default_backend() == ascend.plugin()
    assert ascend.unavailable() is None
    assert backends.unavailable(ascend.plugin(), "dequant_rope_quant_kvcache") is None


def test_report():
    report = ascend.report()
    assert report["plugin"] == NAME
    refused = {"jax": "no plugin takes targets from jax.ffi", "pjrt": "the plugin has no PJRT FFI"}
    for route, key in (("jax", "jax.ffi"), ("pjrt", "PJRT FFI extension")):
        wanted = "registered" if route in ROUTES else refused[route]
        assert report[f"target through {key}"].startswith(wanted)
    libraries = re.sub(r"\S*/lib64/", "", report["CANN"])
    assert libraries == "libopapi.so, libnnopbase.so, libascendcl.so"


def test_enabled_once():
    arguments = {"devices": 8, "platform_name": NAME, "routes": ROUTES}
    assert testing.enable_ascend_standin(**arguments) is ascend_session.STANDIN
    with pytest.raises(RuntimeError, match="enabled with other arguments"):
        testing.enable_ascend_standin(**arguments | {"devices": 2})


def test_devices():
    assert len(jax.devices()) == 8
    assert {device.platform for device in jax.devices()} == {NAME}
    assert jax.devices()[3].device_kind == "Ascend stand-in (CPU)"
    assert str(jax.devices()[3]) == "ASCEND_3"
