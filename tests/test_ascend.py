"""Starts the sessions of tests/ascend: on the stand-in device under both names, and on hardware."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def run_session(session, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", str(TESTS / "ascend")]
    done = subprocess.run(
        [*command, *arguments],
        env=environment | {"ASCEND_SESSION": session},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]


@pytest.mark.parametrize("session", ["ascend jax", "ASCEND pjrt"])
def test_on_the_standin(session):
    run_session(session)
