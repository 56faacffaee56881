"""Attention lowered for CUDA over devices and under vmap: one call for each part, with scratch."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.attention import Call

from jax_kvcache import KVCache, decode_attention

CALL = Call(D=64, B=4, S=1, Nq=8, Nkv=2, rows=4096)
SPECS = (
    P("dp", None, "tp"),
    KVCache(P("dp", None, "tp"), P("dp", None, "tp"), P("tp"), P("tp"), None, None, None),
    P("dp"),
)
attend = functools.partial(decode_attention, implementation="ffi")


def run(q, cache, positions):
    return attend(q, cache, positions=positions)


def arguments():
    q, cache, keywords = CALL.draw()
    return q, cache, jnp.asarray(keywords["positions"])


def explicit():
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (AxisType.Explicit,) * 2)
    placed = jax.tree.map(
        lambda spec, a: jax.device_put(a, NamedSharding(mesh, spec)), SPECS, arguments()
    )
    return run, placed


def manual():
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), (AxisType.Auto,) * 2)
    return jax.shard_map(run, mesh=mesh, in_specs=SPECS, out_specs=SPECS[0]), arguments()


def vmapped():
    return jax.vmap(run), jax.tree.map(lambda a: jnp.stack([a, a]), arguments())


# The results and the scratch of one call: splits * query rows * (64 + 4) numbers.
MODES = {
    "explicit": (explicit, "tensor<2x1x4x64xf32>", 32 * 2 * 4 * 68),
    "manual": (manual, "tensor<2x1x4x64xf32>", 32 * 2 * 4 * 68),
    "vmap": (vmapped, "tensor<2x4x1x8x64xf32>", 32 * 2 * 4 * 8 * 68),
}


@pytest.mark.parametrize("mode", MODES)
def test_one_call(mode):
    make, out, scratch = MODES[mode]
    function, call = make()
    text = jax.jit(function).trace(*call).lower(lowering_platforms=("cuda",)).as_text()
    [line] = [line for line in text.splitlines() if "@decode_attention(" in line]
    assert f"-> ({out}, tensor<0xf32>, tensor<{scratch}xf32>)" in line
