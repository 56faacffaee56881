"""The commands, and what they share.

Each module has `add_parser(subparsers)`, which adds one command and sets its default `run`: a
function of the parsed arguments that returns an exit status, or None for 0.
"""

import argparse

import numpy as np

from jax_kvcache import checkpoints
from jax_kvcache.checkpoints.load import with_scales
from jax_kvcache.checkpoints.tokenizer import Tokenizer
from jax_kvcache.model import Model
from jax_kvcache.model.evaluate import BATCH, Windows, cut_windows

WINDOW = 256  # tokens that are read together, unless --window says otherwise
_LARGE_VOCABULARY = 4096  # windows are read one by one, since their logits fill the memory


class CommandError(Exception):
    """What the user gave cannot be used; the message is one line, the exit status is 2."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which model a command runs."""
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="a checkpoint folder of a Llama, Mistral, Qwen2 or Qwen3 model: AscendV1, "
        "compressed-tensors or float (default: the small one that comes with the package)",
    )
    parser.add_argument(
        "--quantize", choices=("w8a8",), help="quantise the weights of a float folder on loading"
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of commands that decode with an int8 cache."""
    add_model_arguments(parser)
    parser.add_argument(
        "--scales", metavar="FILE", help="an .npz file with the cache's scales (default: its own)"
    )
    parser.add_argument(
        "--implementation",
        choices=("ffi", "xla"),
        help="ffi demands the native target of the write, xla is the jax.numpy reference of the "
        "write and of attention (default: native targets where they can run the call)",
    )


def add_window_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option of commands that read files in windows."""
    parser.add_argument(
        "--window", type=int, default=WINDOW, help=f"tokens per window (default: {WINDOW})"
    )


def model_from(arguments: argparse.Namespace) -> tuple[Model, Tokenizer]:
    """Loads the model that the user asked for, with its tokenizer and the scales."""
    folder = checkpoints.demo_folder() if arguments.model is None else arguments.model
    scales = getattr(arguments, "scales", None)
    try:
        model = checkpoints.load(folder, arguments.quantize, progress=arguments.model is not None)
        tokenizer = checkpoints.load_tokenizer(folder, model.config.vocab)
        return with_scales(model, scales), tokenizer
    except OSError as error:
        name = error.filename if error.filename is not None else folder
        raise CommandError(f"cannot read '{name}': {error.strerror}.") from error
    except (ValueError, ImportError) as error:
        raise CommandError(str(error)) from error


def tokens_of(tokenizer: Tokenizer, text: bytes) -> np.ndarray:
    """The tokens of what the user gave."""
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise CommandError(str(error)) from error


def windows_of(
    arguments: argparse.Namespace, model: Model, tokenizer: Tokenizer, texts: list[bytes]
) -> Windows:
    """The texts, cut into windows."""
    context = model.config.context
    if not 2 <= arguments.window <= context:
        raise CommandError(
            f"`--window` must be in [2, {context}], the model's context, got {arguments.window}."
        )
    batch = BATCH if model.config.vocab <= _LARGE_VOCABULARY else 1
    tokens = [tokens_of(tokenizer, text) for text in texts]
    windows = cut_windows(tokens, arguments.window, batch)
    if not windows.targets.any():
        raise CommandError(f"the text must have at least 2 {tokenizer.unit}s, got fewer.")
    return windows


def read_file(path: str) -> bytes:
    """The bytes of a file that the user named."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise CommandError(f"cannot read '{path}': {error.strerror}.") from error
