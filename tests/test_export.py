"""Everything of ours that an exported function may take or return goes through its bytes."""

import dataclasses
import pickle

import jax
import numpy as np
import pytest
from support import process, public_calls

from jax_kvcache import KVCache, disabled_export_checks

# Calls that return what jax.export has to know: caches, observers and the results' tuples.
CALLS = (
    "KVCache.update",
    "KVCache.update, a traced layer",
    "PagedKVCache.update",
    "KVCache.saturation",
    "dequant_rope_quant_kvcache",
    "MinMax",
    "Sketch",
    "ErrorObserver",
    "ErrorObserver.total",
    "calibrate, mse",
    "calibrate, mse, offset",
    "fake_quantize",
    "attention_error",
    "paired_difference",
)
RUN = """
import pickle, sys
import jax, jax_kvcache, jax_kvcache.numerics
from support import public_calls
for name, data in pickle.load(open(sys.argv[1], "rb")).items():
    result = jax.export.deserialize(data).call(public_calls.arrays())
    total = sum(abs(a.astype(float)).sum() for a in jax.tree.leaves(result))
    print(name, "=", type(result).__name__, total)
"""


def exported(name):
    call = jax.jit(public_calls.calls()[name])
    checks = disabled_export_checks()
    return jax.export.export(call, disabled_checks=checks)(public_calls.arrays())


@pytest.mark.parametrize("name", CALLS)
def test_there_and_back(name):
    arrays = public_calls.arrays()
    got = jax.export.deserialize(exported(name).serialize()).call(arrays)
    want = jax.jit(public_calls.calls()[name])(arrays)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_sizes_of_numpy():
    """They equal Python's everywhere else, and come back as those."""
    cache = KVCache.create(
        1, 4, 1, 2, layers=2, **{f"scale_{n}": np.ones((1, 2), "f") for n in "kv"}
    )
    for given in (cache, dataclasses.replace(cache, layers=np.int64(2), num_q_heads=np.int32(4))):
        exported = jax.export.export(jax.jit(lambda cache: cache))(given)
        again = jax.export.deserialize(exported.serialize()).call(given)
        assert (again.layers, again.num_q_heads) == (given.layers, given.num_q_heads)


def test_in_a_fresh_process(tmp_path):
    names = ("KVCache.update", "Sketch")
    path = tmp_path / "exported"
    path.write_bytes(pickle.dumps({name: exported(name).serialize() for name in names}))
    printed = process.run("-c", RUN, path)
    assert [line.split(" = ")[0] for line in printed.splitlines()] == list(names)


def test_every_native_target_is_named():
    checks = disabled_export_checks()
    assert jax.export.DisabledSafetyCheck.custom_call("dequant_rope_quant_kvcache") in checks
    assert len(set(map(str, checks))) == len(checks)
