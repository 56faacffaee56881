"""What the Ascend operator is not called for, and what `explain` says of it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import calls
from support.internals import Operands, ascend
from support.internals import slots as slots_module

from jax_kvcache import explain

REFUSED = [  # sizes, and the reason
    ({"Nq": 32, "Nkv": 8, "D": 128}, r"H <= 4096, got H = 6144; .* over 2 devices fits \(H = 3072"),
    ({"Nq": 28, "Nkv": 4, "D": 128}, r"H <= 4096, got H = 4608; .* over 2 devices fits \(H = 2304"),
    ({"Nq": 64, "Nkv": 8, "D": 128}, r"got H = 10240; .* over 4 devices fits \(H = 2560\)"),
    ({"Nq": 64, "Nkv": 1, "D": 128}, r"the operator takes H <= 4096, got H = 8448$"),
    ({"Nq": 1, "Nkv": 1, "D": 32}, r"H in multiples of 64, got H = 96$"),
    ({"Nq": 6, "Nkv": 1, "D": 8}, r"D in multiples of 16, got D = 8$"),
    ({"Nq": 8, "Nkv": 4, "D": 16, "dtype": jnp.float16}, r"float16 with D % 32, got D = 16$"),
    ({"Nq": 2, "Nkv": 1, "D": 32}, r"quantises Nkv\*D in multiples of 64 only, got 32$"),
    ({"x_dtype": jnp.float32}, r"takes float16 and bfloat16 tables, got float32$"),
]
TAKEN = [
    {"Nq": 8, "Nkv": 1, "D": 128}, {"Nq": 16, "Nkv": 4, "D": 128}, {"Nq": 8, "Nkv": 4, "D": 16},
    {"Nq": 24, "Nkv": 4, "D": 128}, {"S": 7}, {"S": 7, "cache_mode": "page"}, {"C1": 9},
    {"x_dtype": jnp.float16}, {"x_dtype": jnp.bfloat16},
]  # fmt: skip

MODELS = {  # the README's table: heads of q and of k, D, and the devices they have to be split over
    "Qwen2.5-0.5B": ((14, 2, 64), 1), "Qwen2.5-1.5B": ((12, 2, 128), 1),
    "Qwen2.5-7B": ((28, 4, 128), 2), "Qwen2.5-14B": ((40, 8, 128), 2),
    "Llama-3.2-1B": ((32, 8, 64), 1), "Llama-3-8B": ((32, 8, 128), 2),
    "Mistral-7B": ((32, 8, 128), 2), "Llama-2-7B": ((32, 32, 128), 4),
    "Llama-3-70B": ((64, 8, 128), 4),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    (num_q, num_kv, head_dim), devices = MODELS[name]
    call = calls.arguments(Nq=num_q, Nkv=num_kv, D=head_dim)
    reason = explain(**call, platform="ascend").reason
    assert (f"parallelism over {devices} devices fits" in reason) == (devices > 1)


@pytest.mark.parametrize("platform", ascend.PLATFORMS)
@pytest.mark.parametrize(("sizes", "reason"), REFUSED, ids=str)
def test_refused(sizes, reason, platform):
    call = calls.arguments(**sizes)
    explanation = explain(**call, platform=platform)
    assert explanation.implementation == "xla"
    assert re.search(reason, explanation.reason)
    assert explain(**call, platform=platform, implementation="ffi").implementation is None


@pytest.mark.parametrize("sizes", TAKEN, ids=str)
def test_taken(sizes):
    call = calls.arguments(**sizes)
    options = {"cache_mode": sizes.get("cache_mode", "contiguous"), "platform": "ascend"}
    assert explain(**call, **options).implementation == "ffi"


def canonical(groups, parameter_groups, rows):
    """Types of operands in the primitive's form."""

    def make(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    absent, scale = make(0), make(*parameter_groups, 1, 64)
    cache = make(*groups, *rows, 1, 64, dtype=jnp.int8)
    table = make(*groups, 3, 64, dtype=jnp.bfloat16)
    return Operands(
        x=make(*groups, 3, 256, dtype=jnp.bfloat16), cos=table, sin=table, k_cache=cache,
        v_cache=cache, slots=make(*groups, 3, dtype=jnp.int32), scale_k=scale, scale_v=scale,
        offset_k=absent, offset_v=absent, weight_scale=absent, activation_scale=absent, bias=absent,
    )  # fmt: skip


def test_parameters_per_group():
    assert ascend.refusal(canonical((5, 2), (1, 1), (8,))) is None
    reason = ascend.refusal(canonical((5, 2), (1, 2), (8,)))
    assert reason == "the operator takes one `scale_k`, got one for each group: (1, 2, 1, 64)"


def test_too_many_rows_in_all():
    assert ascend.refusal(canonical((2,), (1,), (2**30 - 1,))) is None
    reason = ascend.refusal(canonical((2,), (1,), (2**30,)))
    assert reason == "the operator's slots are int32, got 2147483648 rows in all groups"


def test_flat_slots():
    slots = np.array([[0, 7, 8, -1], [0, 7, 2**31 - 1, -(2**31)]], np.int32)
    flat = slots_module.group_slots(jnp.asarray(slots), 8)
    np.testing.assert_array_equal(flat, [[0, 7, -1, -1], [8, 15, -1, -1]])
    np.testing.assert_array_equal(
        slots_module.group_slots(jnp.asarray(slots[0]), 8), [0, 7, -1, -1]
    )


def test_flat_slots_up_to_the_last_row():
    rows = 2**30 - 1
    flat = slots_module.group_slots(jnp.asarray([[rows - 1, rows]] * 2, jnp.int32), rows)
    np.testing.assert_array_equal(flat, [[rows - 1, -1], [2 * rows - 1, -1]])


def test_flat_slots_past_what_int32_counts_write_nothing():
    """Only symbolic sizes come here unchecked."""
    rows = 2**30
    flat = slots_module.group_slots(jnp.asarray([[5], [5], [5], [5], [5]], jnp.int32), rows)
    np.testing.assert_array_equal(flat, [[5], [-1], [-1], [-1], [-1]])
