"""`python -m jax_kvcache bench --ascend-host`: what the Ascend handler costs the host."""

import importlib.util
import json

import pytest
from support import process


@pytest.mark.skipif(
    importlib.util.find_spec("xla_plugins") is None,
    reason="the stand-in device needs xla-cpu-pjrt (Linux x86-64)",
)
def test_the_handlers_cost():
    arguments = ("-m", "jax_kvcache", "bench", "--ascend-host", "--rounds", "1")
    found = json.loads(process.run(*arguments, JAX_PLATFORMS=None))["ascend_host"]
    assert set(found) == {"least", "everything"}
    assert all(0.1 < microseconds < 1000 for microseconds in found.values())
