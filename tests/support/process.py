"""Runs a program in a fresh Python process, with this process's import path."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
PROGRAMS = TESTS / "programs"


def command(*arguments) -> list[str]:
    """A command of this Python; -P keeps the working directory out of the import path."""
    return [sys.executable, "-P", *map(str, arguments)]


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment and import path; a change to None removes a variable."""
    path = os.pathsep.join(dict.fromkeys([str(TESTS), *(p or os.getcwd() for p in sys.path)]))
    merged = {**os.environ, "PYTHONPATH": path, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def run(*arguments, timeout: float = 200, **changes: str | None) -> str:
    """What a fresh Python process prints; a failure shows all that it wrote.

    Args:
      *arguments: Python's own: `"-c", code`, `"-m", module` or a program's path and its arguments.
      timeout: the seconds that it may take.
      **changes: changes to the environment.
    """
    try:
        done = subprocess.run(
            command(*arguments),
            env=environment(**changes),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as late:
        written = (text or b"" for text in (late.stdout, late.stderr))
        text = b"".join(written).decode(errors="replace")
        raise AssertionError(f"not done after {timeout} s; it wrote:\n{text[-20000:]}") from None
    output = f"it wrote:\n{done.stdout[-16000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == 0, f"exit status {done.returncode}; {output}"
    return done.stdout
