"""An artifact exported without a device runs on this one."""

import os
from pathlib import Path

import jax
import pytest
from support import golden_calls
from support.results import assert_results


@pytest.mark.skipif("ASCEND_ARTIFACT" not in os.environ, reason="made by test_sessions.py")
def test_artifact(standin):
    path = Path(os.environ["ASCEND_ARTIFACT"])
    exported = jax.export.deserialize(path.read_bytes())
    call = golden_calls.load(path.name)
    caches = {name: jax.device_put(call.inputs[name]) for name in ("k_cache", "v_cache")}
    result = jax.jit(exported.call, donate_argnames=tuple(caches))(**call.inputs | caches)
    assert_results(result, call.expected)
    assert standin.launches == 1
    assert all(cache.is_deleted() for cache in caches.values())
