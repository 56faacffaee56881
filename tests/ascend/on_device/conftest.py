"""Tests that run in a session on an Ascend device, which tests/ascend/test_sessions.py starts.

Without a session (support/ascend_session.py) nothing here is collected.
"""

import pytest
from support.ascend_session import ON_HARDWARE, SESSION, STANDIN

collect_ignore_glob = [] if SESSION else ["test_*.py"]


def pytest_collection_modifyitems(items):
    if ON_HARDWARE:
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
    if ON_HARDWARE:
        return lambda: None
    STANDIN.reset()
    return lambda: STANDIN.launches
