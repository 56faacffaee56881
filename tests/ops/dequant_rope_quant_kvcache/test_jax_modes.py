"""The same bits under JAX's modes: x64, strict promotion, rank checks, no jit, meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support import cases, golden_calls, modes, process

from jax_kvcache import dequant_rope_quant_kvcache

CALLS = ["g02_i32_bf16_contiguous_all", "g07_i32_f16_page_biasi32", "g15_2d_f16_contiguous"]


def check(name, implementation, transform=lambda f: f):
    def on_jax_arrays(operator):
        return lambda **arrays: transform(operator)(**jax.tree.map(jnp.asarray, arrays))

    cases.golden(name)._replace(transform=on_jax_arrays).run(implementation)


MODES = modes.MODES | {"checking_leaks": jax.checking_leaks}


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", MODES)
def test_mode(mode, name, implementation):
    with MODES[mode]():
        check(name, implementation)
        if mode != "no_jit":
            check(name, implementation, jax.jit)


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", CALLS)
def test_mesh(name, explicit, implementation):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((1,), ("b",), (kind,))
    with jax.set_mesh(mesh):
        check(name, implementation)
        check(name, implementation, jax.jit)


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("under_jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", CALLS)
def test_shard_map(name, under_jit, implementation):
    """Default checks on: every result has the right varying axes."""
    mesh = jax.make_mesh((1,), ("b",), (jax.sharding.AxisType.Auto,))

    def wrap(function):
        sharded = jax.shard_map(
            lambda inputs: tuple(function(**inputs)), mesh=mesh, in_specs=P("b"), out_specs=P("b")
        )
        return (jax.jit if under_jit else lambda f: f)(lambda **inputs: sharded(inputs))

    check(name, implementation, wrap)


def test_differentiation_says_what_the_operator_is_for():
    call = golden_calls.load("g03_f16_contiguous")
    with pytest.raises(NotImplementedError, match="inference operator and has no derivative"):
        jax.grad(
            lambda x: (
                dequant_rope_quant_kvcache(**call.inputs | {"x": x}, **call.options)
                .q.astype(jnp.float32)
                .sum()
            )
        )(jnp.asarray(call.inputs["x"]))


def test_stopped_gradients_pass():
    call = golden_calls.load("g03_f16_contiguous")

    def loss(scale):
        x = jax.lax.stop_gradient(scale.astype(jnp.float16) * call.inputs["x"])
        q = dequant_rope_quant_kvcache(**call.inputs | {"x": x}, **call.options).q
        return q.astype(jnp.float32).sum() * scale

    expected = call.expected["q"].astype(np.float32).sum()
    np.testing.assert_allclose(jax.grad(loss)(jnp.float32(1)), expected, rtol=1e-4)


def test_no_backend_starts_at_import():
    code = "import jax_kvcache; from jax.extend import backend as b; import jax; "
    code += "jax.config.update('jax_platforms', 'none'); print('imported')"
    assert process.run("-c", code) == "imported\n"
