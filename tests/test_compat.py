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


CUDNN_CALLS = {
    "PADDING": {"kv_lengths": jnp.ones(3, jnp.int32)},
    "PADDING_CAUSAL": {"kv_lengths": jnp.ones(3, jnp.int32), "causal": True},
    "NO_MASK": {"mask": jnp.ones((3, 1, 37, 128), bool)},
}


@pytest.mark.parametrize("mask_type", CUDNN_CALLS)
def test_cudnn_attention(mask_type, monkeypatch):
    """Lowered for a GPU, where there may be none."""

    class Versions:
        cudnn_get_version = staticmethod(lambda: 91300)
        cuda_runtime_get_version = staticmethod(lambda: 12080)

    monkeypatch.setattr(compat.fused_attention, "cuda_versions", Versions)
    assert compat.has_cudnn()
    q, k = (jnp.zeros((3, *sizes, 80), jnp.float16) for sizes in ((37, 6), (128, 3)))
    call = jax.jit(
        lambda q, k: compat.cudnn_attention(q, k, k, scale=1.0, **CUDNN_CALLS[mask_type])
    )
    out, lse = jax.eval_shape(call, q, k)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == ((3, 37, 6), jnp.float32)
    text = call.trace(q, k).lower(lowering_platforms=("cuda",)).as_text()
    [line] = [line for line in text.splitlines() if "__cudnn$fmha" in line]
    assert re.search(rf"mask_type\W+{mask_type}\b", line.replace("\\22", '"'))
    assert ("Bias" in line) == (mask_type == "NO_MASK")
