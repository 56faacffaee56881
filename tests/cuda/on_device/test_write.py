"""The write on a GPU: the conformance suite to the bit, and repeated rows."""

import numpy as np
import pytest
from support import conformance, oracle
from support.internals import backends, cuda

from jax_kvcache import dequant_rope_quant_kvcache

pytestmark = pytest.mark.cuda_device

# Neighbouring threads write the parts of a row, so a row that several tokens name may hold parts of
# each, which the CPU's kernels never do.
TORN = "duplicates"


def test_available():
    assert cuda.is_here()
    assert backends.unavailable("gpu", "dequant_rope_quant_kvcache") is None


@pytest.mark.parametrize("name", [name for name in conformance.CASES if name != TORN])
def test_case(name):
    for make in conformance.CASES[name]:
        assert make().run("ffi") > 0


def test_repeated_rows():
    """Each byte of a row that several tokens name is one of theirs; no other row changes."""
    slots = [4, 4, 4, 9, 9, 4, -1, 9, 4]
    call = conformance.call_with(slots, C1=conformance.B, S=3, cache_mode="page")
    result = dequant_rope_quant_kvcache(**call, cache_mode="page", implementation="ffi")
    empty = np.zeros_like(call["k_cache"])
    apart = {"indices": np.arange(9, dtype=np.int32), "k_cache": empty, "v_cache": empty}
    alone = oracle.dequant_rope_quant_kvcache(**call | apart, cache_mode="page")
    for name, codes in (("k_cache", alone[3]), ("v_cache", alone[4])):
        after = np.asarray(getattr(result, name)).reshape(-1, 2, 32)
        before = call[name].reshape(-1, 2, 32)
        rows = codes.reshape(-1, 2, 32)[:9]
        for slot in (4, 9):
            candidates = rows[[t for t in range(9) if slots[t] == slot]]
            assert (after[slot] == candidates).any(axis=0).all(), name
        others = [row for row in range(after.shape[0]) if row not in (4, 9)]
        np.testing.assert_array_equal(after[others], before[others])
