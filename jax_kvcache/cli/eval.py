"""`python -m jax_kvcache eval FILE...`: what the int8 cache costs the model, in nats per token."""

import argparse
import json

import numpy as np
from tqdm import tqdm

from jax_kvcache.cli import (
    add_run_arguments,
    add_window_argument,
    model_from,
    read_file,
    windows_of,
)
from jax_kvcache.model.evaluate import nll_float_cache, nll_int8_cache


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "eval",
        help="negative log-likelihood of files, with the int8 cache and with a float cache",
        description="Reads each file in windows of --window tokens that do not overlap, positions "
        "from 0, and prints one JSON line: the number of tokens predicted, and the mean negative "
        "log-likelihood in nats per token with the int8 cache (null for a model without scales) "
        "and with a float cache. A last window of fewer than 2 tokens is dropped. The tokens of "
        "the package's own model are bytes.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="any text; Python suits the model")
    add_window_argument(parser)
    add_run_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Evaluates the files and prints the line."""
    texts = [read_file(path) for path in arguments.files]
    model, tokenizer = model_from(arguments)
    windows = windows_of(arguments, model, tokenizer, texts)
    targets = int(windows.targets.sum())
    has_scales = model.cache_params is not None
    sums = np.zeros(2)
    for tokens, counts in tqdm(
        zip(*windows, strict=True), desc="eval", unit="batch", total=len(windows.tokens)
    ):
        batch = [nll_float_cache(model, tokens, counts)]
        if has_scales:
            int8 = nll_int8_cache(model, tokens, counts, implementation=arguments.implementation)
            batch.append(int8)
        sums[: len(batch)] += np.sum(batch, axis=1, dtype=np.float64)
    float_mean, int8_mean = (sums / targets).tolist()
    print(
        json.dumps(
            {
                "targets": targets,
                "nll_int8_cache": int8_mean if has_scales else None,
                "nll_float_cache": float_mean,
            }
        )
    )
