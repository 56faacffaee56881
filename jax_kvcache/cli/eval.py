"""`python -m jax_kvcache eval FILE...`: what the int8 cache costs the model, in nats per byte."""

import argparse
import json

import numpy as np
from tqdm import tqdm

from jax_kvcache.cli import CommandError, add_model_arguments, model_from, read_file
from jax_kvcache.model.evaluate import cut_windows, nll_float_cache, nll_int8_cache


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "eval",
        help="negative log-likelihood of files, with the int8 cache and with a float cache",
        description="Reads each file in windows of 256 bytes that do not overlap, positions from "
        "0, and prints one JSON line: the number of bytes predicted, and the mean negative "
        "log-likelihood in nats per byte with the int8 cache and with a float cache. A last "
        "window of fewer than 2 bytes is dropped.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="any text; Python suits the model")
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Evaluates the files and prints the line."""
    texts = [read_file(path) for path in arguments.files]
    model = model_from(arguments)
    windows = cut_windows(texts, model.config.context)
    targets = int(windows.targets.sum())
    if not targets:
        raise CommandError("the text must have at least 2 bytes, got fewer.")
    sums = np.zeros(2)
    for tokens, counts in tqdm(
        zip(*windows, strict=True), desc="eval", unit="batch", total=len(windows.tokens)
    ):
        int8 = nll_int8_cache(model, tokens, counts, implementation=arguments.implementation)
        sums += np.sum([int8, nll_float_cache(model, tokens, counts)], axis=1, dtype=np.float64)
    int8_mean, float_mean = (sums / targets).tolist()
    print(
        json.dumps({"targets": targets, "nll_int8_cache": int8_mean, "nll_float_cache": float_mean})
    )
