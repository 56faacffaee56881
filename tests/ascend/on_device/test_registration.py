"""What is said of the device: the plugin, the ways that took the target, CANN's files."""

import re

import jax
import pytest
from support import ascend_session
from support.internals import ascend, ascend_plugin, backends, compat, library, pjrt

from jax_kvcache import testing

PUBLIC = "pjrt_extension" not in ascend_session.ARGUMENTS
NAME = ascend_session.ARGUMENTS.get("platform_name", "ASCEND")


@pytest.mark.ascend_device
def test_available():
    assert jax.default_backend() == ascend_plugin.name()
    assert ascend.unavailable() is None
    assert backends.unavailable(ascend_plugin.name(), "dequant_rope_quant_kvcache") is None


def test_report():
    report = ascend.report()
    libraries = re.sub(r"\S*/lib64/", "", report.pop("CANN"))
    operator = "libopapi.so" if PUBLIC else "libopapi_transformer.so"
    assert libraries == f"{operator}, libnnopbase.so, libascendcl.so"
    refused = "the plugin's hook did not take the target from JAX's queue"
    assert report == {
        "plugin": NAME,
        "offered through jax.ffi": refused if PUBLIC else "accepted",
        "offered through PJRT FFI extension": "accepted"
        if PUBLIC
        else "the plugin has no PJRT FFI extension",
        "target": "registered: a program with it compiles",
    }


@pytest.mark.skipif(not PUBLIC, reason="the runtime has the newest FFI")
def test_a_handler_that_is_too_new_is_accepted_but_not_registered(standin):
    """The CPU's handler reports the version of its headers, as the Ascend one did."""
    handler = jax.ffi.pycapsule(library.symbol("dequant_rope_quant_kvcache_cpu"))
    address = pjrt.capsule_pointer(handler)
    plugin = compat.plugin_api("ascend")
    assert pjrt.register_handler(plugin, "too_new", address, "ASCEND") is None
    assert "No FFI handler registered for too_new" in ascend_plugin._compile("too_new")
    ledger = standin.ledger()
    assert ledger["counts"] == {"handler too new": 1}
    assert ledger["faults"] == ["wrote past the runtime's metadata"]
    standin.reset()


def test_enabled_once():
    again = testing.enable_ascend_standin(**ascend_session.ARGUMENTS)
    assert again is ascend_session.STANDIN
    with pytest.raises(RuntimeError, match="enabled with other arguments"):
        testing.enable_ascend_standin(**ascend_session.ARGUMENTS | {"devices": 2})


def test_devices():
    assert len(jax.devices()) == 8
    assert {device.platform for device in jax.devices()} == {NAME}
    assert jax.devices()[3].device_kind == "Ascend stand-in (CPU)"
    assert str(jax.devices()[3]) == "ASCEND_3"
