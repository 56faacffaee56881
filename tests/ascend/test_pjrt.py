"""Registering a handler with a PJRT plugin's FFI extension, on a PJRT_Api made by hand."""

import ctypes

import jax
import pytest
from support.internals import ascend, ascend_plugin, compat, pjrt

FFI, OTHER = 5, 2  # extension types
ERROR, MESSAGE = 77, b"Duplicate FFI handler registration"


class FakePlugin:
    """A PJRT_Api with two extensions, the second of which may be FFI, and what was asked of it."""

    def __init__(self, error=None, extension_type=FFI):
        self.registered, self.destroyed = [], []
        fields = {name: field for struct in (pjrt._Api, pjrt._FfiExtension)
                  for name, field in struct._fields_}  # fmt: skip

        def register(address):
            args = pjrt._RegisterArgs.from_address(address)
            name, platform = args.name[: args.name_size], args.platform[: args.platform_size]
            self.registered.append((args.struct_size, name, args.handler, platform, args.traits))
            return error

        def message(address):
            args = pjrt._ErrorArgs.from_address(address)
            assert (args.struct_size, args.error) == (40, ERROR)
            args.message = ctypes.cast(MESSAGE, ctypes.c_void_p).value
            args.message_size = len(MESSAGE)

        def destroy(address):
            args = pjrt._ErrorArgs.from_address(address)
            self.destroyed.append((args.struct_size, args.error))

        self.ffi = pjrt._FfiExtension(register_handler=fields["register_handler"](register))
        self.ffi.base.type = extension_type
        self.other = pjrt._Extension(type=OTHER, next=ctypes.addressof(self.ffi))
        self.api = pjrt._Api(
            extension_start=ctypes.addressof(self.other),
            error_message=fields["error_message"](message),
            error_destroy=fields["error_destroy"](destroy),
        )
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self.capsule = new(ctypes.addressof(self.api), b"pjrt_c_api", None)

    def take(self):
        return pjrt.register_handler(self.capsule, "name", 4321, "ASCEND")


def test_registers():
    plugin = FakePlugin()
    assert plugin.take() is None
    assert plugin.registered == [(52, b"name", 4321, b"ASCEND", 0)]


def test_an_error_is_passed_on_and_freed():
    plugin = FakePlugin(error=ERROR)
    assert plugin.take() == MESSAGE.decode()
    assert plugin.destroyed == [(24, ERROR)]


def test_without_the_extension():
    plugin = FakePlugin(extension_type=OTHER)
    assert plugin.take() == "the plugin has no PJRT FFI extension"
    assert plugin.registered == []


@pytest.mark.parametrize("error", [None, ERROR], ids=["taken", "refused"])
def test_when_jax_discovers_the_plugin(error, monkeypatch):
    plugin = FakePlugin(error=error)
    monkeypatch.setattr(ascend_plugin, "_offers", ascend_plugin._Offers(through_pjrt="not yet"))
    monkeypatch.setattr(compat, "plugin_api", lambda name: plugin.capsule)
    monkeypatch.setattr(compat, "on_plugins_discovered", lambda f: f(plugin.capsule))
    ascend_plugin.register(ascend.ASCEND)
    assert {args[3] for args in plugin.registered} == {b"ascend", b"ASCEND"}
    wanted = None if error is None else MESSAGE.decode()
    assert ascend_plugin.offers()["PJRT FFI extension"] == wanted


def test_a_hook_that_raises(monkeypatch):
    def hook(*args, **kwargs):
        raise RuntimeError("no room")

    monkeypatch.setattr(ascend_plugin, "_offers", ascend_plugin._Offers(through_jax=None))
    monkeypatch.setattr(jax.ffi, "register_ffi_target", hook)
    ascend_plugin.register(ascend.ASCEND)
    assert ascend_plugin.offers()["jax.ffi"] == "the plugin's hook raised RuntimeError: no room"


def test_a_hook_that_leaves_the_target_in_the_queue(monkeypatch):
    """JAX has recorded the hook, so that it looks as if the plugin took targets."""
    assert ascend_plugin.offers()["jax.ffi"] == "no plugin takes targets from jax.ffi"
    for platform in ascend.PLATFORMS:
        assert "dequant_rope_quant_kvcache" in compat.queued_ffi_targets(platform)
    monkeypatch.setattr(compat, "has_custom_call_handler", lambda platform: True)
    reason = "the plugin's hook did not take the target from JAX's queue"
    assert ascend_plugin.offers()["jax.ffi"] == reason
    monkeypatch.setattr(compat, "queued_ffi_targets", lambda platform: set())
    assert ascend_plugin.offers()["jax.ffi"] is None
