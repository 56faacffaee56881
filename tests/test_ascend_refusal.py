"""What the Ascend operator is not called for, and what `explain` says of it."""

import calls
import jax
import jax.numpy as jnp
import pytest

from jax_kvcache import _ascend, dequant_rope_quant_kvcache, explain
from jax_kvcache._reference import Operands

REFUSED = [  # sizes, and the reason
    ({"Nq": 32, "Nkv": 8, "D": 128}, "H <= 4096, got H = 6144; tensor parallelism over 2 devices"),
    ({"Nq": 28, "Nkv": 4, "D": 128}, "H <= 4096, got H = 4608; tensor parallelism over 2 devices"),
    ({"Nq": 64, "Nkv": 8, "D": 128}, "got H = 10240; tensor parallelism over 4 devices fits"),
    ({"Nq": 64, "Nkv": 1, "D": 128}, "the operator takes H <= 4096, got H = 8448$"),
    ({"Nq": 1, "Nkv": 1, "D": 32}, "H in multiples of 64, got H = 96"),
    ({"Nq": 6, "Nkv": 1, "D": 8}, "D in multiples of 16, got D = 8"),
    ({"Nq": 8, "Nkv": 4, "D": 16, "x_dtype": jnp.float16}, "misaligned for float16 with D % 32"),
    ({"Nq": 2, "Nkv": 1, "D": 32}, r"quantises Nkv\*D in multiples of 64 only, got 32"),
    ({"Nq": 1, "Nkv": 10, "D": 112}, r"quantises|addresses|tensor"),
    ({"Nq": 0, "Nkv": 16, "D": 128}, None),
    ({"x_dtype": jnp.float32}, "takes float16 and bfloat16 tables, got float32"),
]
TAKEN = [
    {"Nq": 8, "Nkv": 1, "D": 128}, {"Nq": 16, "Nkv": 4, "D": 128}, {"Nq": 8, "Nkv": 4, "D": 16},
    {"Nq": 24, "Nkv": 4, "D": 128},  # H = 4096
    {"S": 7}, {"S": 7, "cache_mode": "page"}, {"x_dtype": jnp.float16}, {"x_dtype": jnp.bfloat16},
]  # fmt: skip


def canonical(groups=(), shared=True, rows=(4, 8), num_q=2, num_kv=1, d=64):
    """Types of operands in the primitive's form."""
    def make(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    own = (1,) * len(groups) if shared else groups
    absent = make(0)
    cache = make(*groups, *rows, num_kv, d, dtype=jnp.int8)
    table = make(*groups, 3, d, dtype=jnp.bfloat16)
    return Operands(
        x=make(*groups, 3, (num_q + 2 * num_kv) * d, dtype=jnp.bfloat16), cos=table, sin=table,
        k_cache=cache, v_cache=cache, slots=make(*groups, 3, dtype=jnp.int32),
        scale_k=make(*own, num_kv, d), scale_v=make(*own, num_kv, d), offset_k=absent,
        offset_v=absent, weight_scale=absent, activation_scale=absent, bias=absent,
    )  # fmt: skip


@pytest.mark.parametrize("platform", _ascend.PLATFORMS)
@pytest.mark.parametrize(("sizes", "reason"), [r for r in REFUSED if r[1]], ids=str)
def test_refused(sizes, reason, platform):
    call = calls.arguments(**sizes)
    assert explain(**call, platform=platform).implementation == "xla"
    with pytest.raises(AssertionError, match="explained: .*" + reason):
        raise AssertionError(f"explained: {explain(**call, platform=platform).reason}")
    assert explain(**call, platform=platform, implementation="ffi").implementation is None


@pytest.mark.parametrize("sizes", TAKEN, ids=str)
def test_taken(sizes):
    assert explain(**calls.arguments(**sizes), platform="ascend").implementation == "ffi"
