"""Hostile calls under compute-sanitizer: no access outside of an array, no race between threads."""

import shutil
import subprocess

import pytest
from support import process

pytestmark = pytest.mark.cuda_device


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_hostile_calls(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH")
    program = process.PROGRAMS / "hostile_calls_on_gpu.py"
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", *process.command(program)],
        # Each buffer has memory of its own, so that an access past its end is seen.
        env=process.environment(XLA_PYTHON_CLIENT_ALLOCATOR="platform"),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    assert "all calls ended" in done.stdout
