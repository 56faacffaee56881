"""The command line: `python -m jax_kvcache COMMAND`; each command is a file under cli/."""

import argparse
import sys
from collections.abc import Sequence

from jax_kvcache.cli import CommandError, bench, calibrate, demo, info
from jax_kvcache.cli import eval as eval_command

COMMANDS = (demo, eval_command, calibrate, bench, info)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_kvcache",
        description="An int8 KV cache for JAX, written by one operator.",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    arguments = parser.parse_args(argv)
    if not hasattr(arguments, "run"):
        parser.print_help()
        return 0
    try:
        return arguments.run(arguments) or 0
    except (CommandError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
