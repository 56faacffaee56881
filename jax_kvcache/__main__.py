"""The command line: `python -m jax_kvcache COMMAND`; each command is a file under cli/."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence

from jax_kvcache.cli import CommandError, bench, calibrate, demo, explain, info
from jax_kvcache.cli import eval as eval_command
from jax_kvcache.version import __version__

COMMANDS = (demo, eval_command, calibrate, explain, bench, info)
INTERRUPTED, PIPE_CLOSED = 130, 141  # as a shell reports SIGINT and SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show what is written
    try:
        try:
            return _run(argv)
        finally:
            print(end="", flush=True)  # so that what cannot be written shows here
    except (CommandError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return PIPE_CLOSED
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        _drop_output()
        return 2


def _drop_output() -> None:
    """Discards what stdout still holds, so that Python does not fail to write it at exit."""
    with contextlib.suppress(io.UnsupportedOperation), open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), sys.stdout.fileno())


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jax_kvcache",
        description="An int8 KV cache for JAX: one operator writes it, attention reads it, and "
        "models and scales come from checkpoint folders.",
    )
    parser.add_argument("--version", action="version", version=f"jax_kvcache {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    arguments = parser.parse_args(argv)
    if not hasattr(arguments, "run"):
        parser.print_help()
        return 0
    return arguments.run(arguments) or 0


if __name__ == "__main__":
    sys.exit(main())
