"""The commands, and what they share.

Each module has `add_parser(subparsers)`, which adds one command and sets its default `run`: a
function of the parsed arguments that returns an exit status, or None for 0.
"""

import argparse

from jax_kvcache.model import Model, load_model


class CommandError(Exception):
    """What the user gave cannot be used; the message is one line, the exit status is 2."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every command that runs the model."""
    parser.add_argument(
        "--scales", metavar="FILE", help="an .npz file with the cache's scales (default: its own)"
    )
    parser.add_argument(
        "--implementation",
        choices=("ffi", "xla"),
        help="the operator's lowering (default: native where there is one, else xla)",
    )


def model_from(arguments: argparse.Namespace) -> Model:
    """Loads the model with the scales that the user asked for."""
    try:
        return load_model(arguments.scales)
    except OSError as error:
        raise CommandError(f"cannot read '{arguments.scales}': {error.strerror}.") from error
    except ValueError as error:
        raise CommandError(str(error)) from error


def read_file(path: str) -> bytes:
    """The bytes of a file that the user named."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise CommandError(f"cannot read '{path}': {error.strerror}.") from error
