"""What the Ascend handler costs the host per call, over a stand-in CANN that does nothing."""

import statistics

import jax
import jax.numpy as jnp

from jax_kvcache import testing
from jax_kvcache.ops.dequant_rope_quant_kvcache.api import dequant_rope_quant_kvcache

CALLS = 200  # per round
B, NQ, NKV, D, LENGTH = 8, 8, 1, 128, 256


def _call(everything: bool) -> dict[str, jax.Array]:
    """A decoding step's arguments: bfloat16 x and nothing optional, or int32 x and all of it."""
    width = (NQ + 2 * NKV) * D
    call = {
        "x": jnp.ones((B, width), jnp.int32 if everything else jnp.bfloat16),
        "cos": jnp.ones((B, D), jnp.bfloat16),
        "sin": jnp.ones((B, D), jnp.bfloat16),
        "k_cache": jnp.zeros((B, LENGTH, NKV, D), jnp.int8),
        "v_cache": jnp.zeros((B, LENGTH, NKV, D), jnp.int8),
        "indices": jnp.zeros(B, jnp.int32),
    }
    parameters = ["scale_k", "scale_v"] + ["offset_k", "offset_v"] * everything
    call |= {name: jnp.ones((NKV, D), jnp.float32) for name in parameters}
    if everything:
        call["weight_scale"] = jnp.ones(width, jnp.float32)
        call["activation_scale"] = jnp.ones(B, jnp.float32)
        call["bias"] = jnp.ones(width, jnp.float32)
    return call


def measure(rounds: int) -> dict[str, float]:
    """Microseconds per call of the handler, by form of the call; medians over rounds.

    The time in the runtime's functions (the stream, the scratch memory) is not in it.
    """
    standin = testing.enable_ascend_standin(cann="idle")

    def step(**call):
        return dequant_rope_quant_kvcache(**call, kv_output=True, implementation="ffi")

    found = {}
    for name, everything in (("least", False), ("everything", True)):
        jitted = jax.jit(step, donate_argnames=("k_cache", "v_cache"))
        call = _call(everything)
        times = []
        for _ in range(rounds + 1):
            standin.reset()
            for _ in range(CALLS):
                result = jitted(**call)
                call |= {"k_cache": result.k_cache, "v_cache": result.v_cache}
            jax.block_until_ready(result)
            counts = standin.ledger()["counts"]
            times.append(counts["handler nanoseconds"] / counts["handler"] / 1e3)
        found[name] = statistics.median(times[1:])  # the first round loads CANN
    return found
