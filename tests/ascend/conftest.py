"""A session on an Ascend device: the stand-in, or a real one; tests/test_ascend.py starts it.

The environment variable ASCEND_SESSION says which: the stand-in's platform name and its routes,
such as "ASCEND pjrt", or "device". Without it nothing here is collected.
"""

import os
import sys
from pathlib import Path

import pytest

SESSION = os.environ.get("ASCEND_SESSION", "")
sys.path.insert(0, str(Path(__file__).parent.parent))  # oracle, golden_calls, ...

collect_ignore_glob = [] if SESSION else ["test_*.py"]

if SESSION and SESSION != "device":
    from jax_kvcache import testing

    _name, *_routes = SESSION.split()
    STANDIN = testing.enable_ascend_standin(devices=8, platform_name=_name, routes=_routes)


def pytest_collection_modifyitems(items):
    if SESSION == "device":
        items[:] = [item for item in items if item.get_closest_marker("ascend_device")]


@pytest.fixture
def standin():
    """The stand-in's memory, empty; at the end nothing may be alive and nothing have gone wrong."""
    STANDIN.reset()
    yield STANDIN
    ledger = STANDIN.ledger()
    assert ledger["faults"] == []
    assert ledger["pending"] == {}
    assert not any(ledger["alive"].values()), ledger["alive"]
    for kind in ("tensor", "int_array", "executor", "scratch"):
        created = ledger["counts"].get(f"{kind} created", 0)
        assert ledger["counts"].get(f"{kind} destroyed", 0) == created


@pytest.fixture
def launches():
    """Counts the operator's launches; on a real device `implementation="ffi"` has to do."""
    if SESSION == "device":
        return lambda: None
    STANDIN.reset()
    return lambda: STANDIN.launches
