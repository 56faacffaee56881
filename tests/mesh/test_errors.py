"""Shardings that cannot be had without moving a cache, and places without automatic mode."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import calls, layouts
from support.internals import modes

from jax_kvcache import dequant_rope_quant_kvcache

CACHES = ("k_cache", "v_cache")
KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}
SIZES = dict(B=4, S=1, Nq=4, Nkv=4, D=8, C1=4, C2=8)


def step(mesh, k_spec, v_spec=None, jit=jax.jit, **sizes):
    call = calls.ones(**SIZES | sizes)
    specs = {"k_cache": k_spec, "v_cache": k_spec if v_spec is None else v_spec}
    call = {
        name: jax.device_put(value, NamedSharding(mesh, specs.get(name, P())))
        for name, value in call.items()
    }
    return jit(dequant_rope_quant_kvcache)(**call)


REFUSED = {
    "head_dim": (dict(k_spec=P(None, None, None, "tp")), "must not be sharded over its last dim"),
    "caches": (dict(k_spec=P("dp"), v_spec=P(None, "dp")), "`v_cache` must be sharded like `k_c"),
    "q_heads": (dict(k_spec=P(None, None, "tp"), Nq=3), "Nq divisible by 2, got Nq = 3"),
}


@pytest.mark.parametrize("rows", [(4, 6), (6, 4)])
@pytest.mark.parametrize("mode", ["contiguous", "page"])
def test_a_cache_in_unequal_parts(mode, rows):
    """Only a constraint can ask for it. What XLA adds to make them equal is no row."""
    mesh = jax.make_mesh((4,), ("x",), (AxisType.Auto,))
    call = calls.ones(**SIZES | dict(zip(("C1", "C2"), rows, strict=True)))
    spec = P("x") if rows[0] % 4 else P(None, "x")
    where = NamedSharding(mesh, spec)

    @jax.jit
    def run(call):
        caches = {n: jax.lax.with_sharding_constraint(call[n], where) for n in CACHES}
        return dequant_rope_quant_kvcache(**call | caches, cache_mode=mode)

    call = {name: jax.device_put(value, NamedSharding(mesh, P())) for name, value in call.items()}
    message = "`k_cache` must be cut into equal parts, got a dimension of 6 over 4 devices"
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        run(call)


def test_unreduced_operands():
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (AxisType.Explicit,) * 2)
    call = calls.ones(**SIZES)
    x = jnp.zeros((*call["x"].shape[:-1], 2), jnp.bfloat16)
    weight = jnp.zeros((2, call["x"].shape[-1]), jnp.bfloat16)
    call |= {n: jnp.ones(call[n].shape, jnp.bfloat16) for n in ("cos", "sin")}
    call = {n: jax.device_put(a, NamedSharding(mesh, P())) for n, a in call.items()}
    x = jax.device_put(x, NamedSharding(mesh, P(None, None, "tp")))
    weight = jax.device_put(weight, NamedSharding(mesh, P("tp", None)))
    for name in ("weight_scale", "activation_scale", "bias"):
        call.pop(name, None)

    def run(x, weight, call):
        out = NamedSharding(mesh, P(None, None, None, unreduced={"tp"}))
        x = jnp.einsum("bsk,kh->bsh", x, weight, out_sharding=out)
        return dequant_rope_quant_kvcache(**call | {"x": x})

    with pytest.raises(ValueError, match=r"an operand is unreduced over \['tp'\]"):
        jax.jit(run)(x, weight, call)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", REFUSED)
def test_layout_is_refused(case, kind):
    arguments, message = REFUSED[case]
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (KINDS[kind],) * 2)
    error = jax.errors.JaxRuntimeError if kind == "automatic" else ValueError
    with pytest.raises(error, match=message):
        step(mesh, **arguments)


def test_a_cache_must_come_out_as_it_goes_in():
    mesh = jax.make_mesh((4,), ("dp",), (AxisType.Auto,))
    jit = functools.partial(
        jax.jit, out_shardings=(None, None, None, *[NamedSharding(mesh, P("dp"))] * 2)
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="must come out sharded as it goes in"):
        step(mesh, P(None, "dp"), jit=lambda f: jit(lambda **call: tuple(f(**call))))


def partly_manual(mesh):
    """A replacement for jax.jit that makes the axis "dp" manual and leaves "tp" as it is."""

    def jit(f):
        def one(call):
            return f(**call).k_cache

        return jax.jit(
            lambda **call: jax.shard_map(
                one, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={"dp"}
            )(call)
        )

    return jit


def test_automatic_axes_beside_manual_ones():
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (AxisType.Auto,) * 2)

    message = r"cannot mix automatic mesh axes \['tp'\] with manual or explicit ones \['dp'\]"
    with pytest.raises(NotImplementedError, match=message):
        step(mesh, P(), jit=partly_manual(mesh))


def test_explicit_axes_beside_manual_ones_before_jax_0_10(monkeypatch):
    monkeypatch.setattr(modes, "nests_manual_axes", lambda: False)
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (AxisType.Explicit,) * 2)

    message = (
        r"cannot have explicit mesh axes \['tp'\] beside manual ones \['dp'\] with JAX .* Make them"
        " all manual .* or use JAX 0.10 or newer"
    )
    with pytest.raises(NotImplementedError, match=message):
        step(mesh, P(), jit=partly_manual(mesh))


def lower(kind, platform):
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (KINDS[kind],) * 2)
    call = layouts.placed(layouts.LAYOUTS["batch_heads"], mesh)
    traced = jax.jit(functools.partial(dequant_rope_quant_kvcache, implementation="xla")).trace
    return traced(**call).lower(lowering_platforms=(platform,))


def test_automatic_mode_needs_custom_partitioning():
    message = "over 4 devices in automatic mode .* ascend does not have. Use explicit mesh axes"
    with pytest.raises(NotImplementedError, match=message):
        lower("automatic", "ascend")


def test_explicit_mode_needs_none():
    assert "CustomSPMDPartitioning" in lower("automatic", "tpu").as_text()
    assert "CustomSPMDPartitioning" not in lower("explicit", "ascend").as_text()


def test_automatic_mode_cannot_be_exported():
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (AxisType.Auto,) * 2)
    call = layouts.placed(layouts.LAYOUTS["batch_heads"], mesh)
    exporter = jax.export.export(jax.jit(lambda call: dequant_rope_quant_kvcache(**call)))
    with pytest.raises(NotImplementedError, match="cannot be exported"):
        exporter(call)


def test_one_device_of_many_is_not_automatic_mode():
    """Nothing is partitioned for a program on one device, whatever else the process has."""
    assert jax.device_count() > 1
    call = calls.ones(**SIZES)
    lowered = jax.jit(dequant_rope_quant_kvcache).lower(**call)
    assert "CustomSPMDPartitioning" not in lowered.as_text()
    assert jnp.isfinite(dequant_rope_quant_kvcache(**call).q.astype(jnp.float32)).all()
