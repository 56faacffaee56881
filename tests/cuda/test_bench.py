"""The benchmark's GPU part, as far as a CPU goes: how a profile is read, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.internals import bench_gpu

PROFILE = """
planes {
  name: "/device:GPU:0"
  lines { name: "Stream #14(Compute)" events { metadata_id: 1 duration_ps: 7000 } }
  lines { name: "Stream #15(MemcpyD2D)" events { metadata_id: 1 duration_ps: 2000 } }
  lines { name: "XLA Ops" events { metadata_id: 1 duration_ps: 50000 } }
}
planes { name: "/host:CPU" lines { name: "Stream" events { metadata_id: 1 duration_ps: 90000 } } }
"""


def test_kernel_times_are_those_of_the_streams():
    serialized = jax.profiler.ProfileData.text_proto_to_serialized_xspace(PROFILE)
    profile = jax.profiler.ProfileData.from_serialized_xspace(serialized)
    assert bench_gpu.kernel_nanoseconds(profile) == 9


def test_without_a_gpu_there_is_nothing_to_measure():
    with pytest.raises(bench_gpu.CommandError, match="nothing to measure: "):
        bench_gpu.measure(1)


def test_a_profile_is_taken():
    """On a CPU there is no GPU in it, so the time is 0."""
    step = jax.jit(lambda state: (state + 1, state))
    assert bench_gpu.kernel_microseconds(step, jnp.zeros(3)) == 0


@pytest.mark.parametrize("block", [None, 16])
def test_what_attention_reads(block):
    """Codes of all kinds, and no result that XLA would have to copy beside the one that counts."""
    steps = bench_gpu._read_steps(bench_gpu.Read(2, 64, block))
    assert ("cudnn_bfloat16" in steps) == (block is None)
    make_state, step, (cache,) = steps["xla"]
    state, rest = step(make_state(), cache)
    assert state.shape == (2, 1, bench_gpu.Nq, bench_gpu.D)
    assert not jax.tree.leaves(rest)
    assert (
        len(np.unique(np.asarray(cache.k_cache)))
        == len(np.unique(np.asarray(cache.v_cache)))
        == 256
    )


def test_wall_time():
    step = jax.jit(lambda state: (state + 1, state))
    assert bench_gpu.microseconds(step, jnp.zeros(3), rounds=2) > 0
