"""Fails when a new JAX moves one of the private things that jax_kvcache/_compat.py takes."""

import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
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


def test_types_say_what_varies():
    mesh = jax.make_mesh((2,), ("dp",), (jax.sharding.AxisType.Auto,))
    seen = []

    def one(x):
        aval = jax.typeof(x)
        seen.append(compat.varying_axes(aval))
        made = compat.shaped_array((3,), "int8", jax.typeof(jnp.zeros(3)).sharding, aval)
        seen.append((made.shape, made.dtype.name, compat.varying_axes(made)))
        return x

    spec = jax.sharding.PartitionSpec("dp")
    jax.eval_shape(jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec), jnp.zeros(2))
    assert seen == [{"dp"}, ((3,), "int8", {"dp"})]
    assert compat.varying_axes(jax.typeof(jnp.zeros(2))) == frozenset()


def test_only_compat_knows_what_types_call_their_manual_axes():
    """JAX 0.9 and 0.10 call it by different names."""
    package = Path(compat.__file__).parent
    others = [path for path in package.rglob("*.py") if path.name != "_compat.py"]
    assert not [path for path in others if re.search(r"manual_axis_type|\.vma\b", path.read_text())]


def test_nested_manual_axes():
    assert compat.nests_manual_axes() == (jax.__version_info__ >= (0, 10))


def test_targets_queue_until_a_plugin_takes_them():
    assert compat.queued_ffi_targets("a platform") == set()
    jax.ffi.register_ffi_target("another target", object(), platform="a platform")
    assert compat.queued_ffi_targets("a platform") == {"another target"}
    compat.register_custom_call_handler("a platform", lambda *args: None)
    assert compat.queued_ffi_targets("a platform") == set()


def test_without_the_donation_shim(monkeypatch):
    """What the shim is for."""
    monkeypatch.setattr(compat.mlir, "_platforms_with_donation", ["cpu"])
    traced = jax.jit(lambda x: x + 1, donate_argnums=0).trace(jax.ShapeDtypeStruct((4,), "int8"))
    with pytest.warns(UserWarning, match="Donation is not implemented"):
        traced.lower(lowering_platforms=("ascend",))
