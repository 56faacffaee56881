"""Fails when a new JAX moves one of the private things that jax_kvcache/_compat.py takes."""

import inspect

import jax
import pytest
from support.internals import ascend, compat, primitive


def test_donation():
    known = compat.mlir._platforms_with_donation
    assert isinstance(known, list)
    assert {"cpu", "cuda", *ascend.PLATFORMS} <= set(known)
    before = list(known)
    compat.enable_donation(ascend.PLATFORMS)
    assert known == before


def test_backends():
    jax.devices()
    assert compat.backends_are_initialized()
    assert compat.initialized_backends()["cpu"] == "cpu"


def test_plugins():
    assert compat.plugin_api("no such plugin") is None
    assert "c_api" in compat.xla_bridge.BackendRegistration.__dataclass_fields__
    parameters = inspect.signature(compat.xla_bridge.register_plugin).parameters
    assert {"priority", "library_path", "options"} <= set(parameters)
    jax.devices()
    found = []
    compat.on_plugins_discovered(lambda c_api: found.append(c_api))
    plugins = [r for r in compat.xla_bridge._backend_factories.values() if r.c_api is not None]
    assert len(found) == len(plugins)


def test_custom_call_handlers():
    assert not compat.has_custom_call_handler("no such platform")
    taken = []
    compat.register_custom_call_handler("platform of a test", lambda *args: taken.append(args[0]))
    assert compat.has_custom_call_handler("platform of a test")
    jax.ffi.register_ffi_target("target of a test", object(), platform="platform of a test")
    assert taken == ["target of a test"]


def test_lowering_context():
    known = compat.dispatch.prim_requires_devices_during_lowering
    assert primitive.dequant_rope_quant_kvcache_p in known
    seen = []

    def lowering(ctx, x):
        seen.append((compat.num_automatic_devices(ctx), compat.is_export(ctx)))
        return [x]

    identity = jax.extend.core.Primitive("identity of a test")
    identity.def_abstract_eval(lambda x: x)
    compat.mlir.register_lowering(identity, lowering)
    function = jax.jit(identity.bind)
    function.lower(1.0)
    jax.export.export(function)(1.0)
    assert seen == [(1, False), (1, True)]


def test_without_the_donation_shim(monkeypatch):
    """What the shim is for."""
    monkeypatch.setattr(compat.mlir, "_platforms_with_donation", ["cpu"])
    traced = jax.jit(lambda x: x + 1, donate_argnums=0).trace(jax.ShapeDtypeStruct((4,), "int8"))
    with pytest.warns(UserWarning, match="Donation is not implemented"):
        traced.lower(lowering_platforms=("ascend",))
