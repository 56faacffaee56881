"""`python -m jax_kvcache calibrate FILE...`: scales for a model's cache from any text."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jax_kvcache import numerics
from jax_kvcache.checkpoints import kv_scales
from jax_kvcache.checkpoints.save import cache_params_of_files
from jax_kvcache.cli import (
    CommandError,
    add_model_arguments,
    add_window_argument,
    model_from,
    read_file,
    windows_of,
)
from jax_kvcache.cli.output import figure_file, output_file, output_folder
from jax_kvcache.model import calibrate as observed

_COLORS = {"k": "#0072B2", "v": "#D55E00"}  # Okabe-Ito: blue, vermilion


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "calibrate",
        help="scales for a model's cache, from any text",
        description="Reads the files in windows of --window tokens, observes K (after RoPE) and V "
        "of every channel, writes scales that `demo` and `eval` take with --scales, and prints "
        "what they cost on the same text.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="any text; Python suits the model")
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="the file, or the new folder, to write"
    )
    parser.add_argument(
        "--format",
        choices=kv_scales.FORMATS,
        default="npz",
        help="npz, onnxruntime (genai's JSON): a file; ascend_v1 (C8 tensors), "
        "compressed_tensors: a folder (default: npz)",
    )
    parser.add_argument(
        "--reduce",
        choices=("max",),
        help="one scale per head, the largest of its channels', where the format holds no more",
    )
    parser.add_argument(
        "--method",
        choices=numerics.METHODS,
        help="(default: absmax, or minmax with --asymmetric)",
    )
    parser.add_argument(
        "--asymmetric", action="store_true", help="with offsets; not for absmax (see minmax)"
    )
    parser.add_argument(
        "--percentile",
        type=float,
        help="percent of the values that fit, for --method percentile (default: 99.99)",
    )
    add_window_argument(parser)
    add_model_arguments(parser)
    parser.add_argument("--plot", metavar="FILE", help="write a figure of the channels")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Observes, calibrates, measures, writes."""
    if arguments.method is None:
        arguments.method = "minmax" if arguments.asymmetric else "absmax"
    elif arguments.asymmetric and arguments.method == "absmax":
        raise CommandError(
            "`--asymmetric` needs `--method minmax`, `percentile` or `mse`, got `--method absmax`."
        )
    if arguments.percentile is None:
        arguments.percentile = 99.99
    elif arguments.method != "percentile":
        raise CommandError(
            f"`--percentile` goes with `--method percentile`, got `--method {arguments.method}`."
        )
    if not 0 < arguments.percentile <= 100:
        raise CommandError(f"`--percentile` must be in (0, 100], got {arguments.percentile:g}.")
    if arguments.asymmetric and arguments.format in kv_scales.WITHOUT_OFFSETS:
        raise CommandError(f"`--format {arguments.format}` holds no offsets: omit `--asymmetric`.")
    if arguments.reduce is None and arguments.format in kv_scales.PER_HEAD:
        raise CommandError(
            f"`--format {arguments.format}` holds one scale per head: add `--reduce max`."
        )
    texts = [read_file(path) for path in arguments.files]
    with _output(arguments) as out, figure_file(arguments.plot) as pyplot:
        model, tokenizer = model_from(arguments)
        windows = windows_of(arguments, model, tokenizer, texts)
        ranges, calibrations, errors = _calibrate(arguments, model, windows)
        _save(out, model, calibrations, arguments)
        if pyplot is not None:
            _plot(pyplot, ranges, calibrations)
    _print_table(ranges, calibrations, errors)
    print(f"wrote {arguments.out}")


def _calibrate(arguments, model, windows):
    """The ranges seen, the calibrations and their `ErrorObserver`s, each of "k" and "v"."""
    channels = observed.channels(model)

    def batches(description):
        pairs = zip(*windows, strict=True)
        return tqdm(pairs, desc=description, unit="batch", total=len(windows.tokens))

    kind = numerics.MinMax if arguments.method in ("absmax", "minmax") else numerics.Sketch
    observers = {name: kind.create(channels) for name in "kv"}
    how = dict(
        method=arguments.method,
        symmetric=not arguments.asymmetric,
        percentile=arguments.percentile,
    )
    for tokens, targets in batches("observe"):
        observers = observed.observe_windows(model, observers, tokens, targets)
        jax.block_until_ready(observers)  # so that the bar shows work done
    calibrations = _as_written(numerics.calibrate(observers, **how), arguments)
    errors = {name: numerics.ErrorObserver.create(channels) for name in "kv"}
    for tokens, targets in batches("measure"):
        errors = observed.measure_windows(model, errors, calibrations, tokens, targets)
        jax.block_until_ready(errors)
    ranges = {n: o.range if isinstance(o, numerics.Sketch) else o for n, o in observers.items()}
    return ranges, calibrations, errors


def _print_table(ranges, calibrations, errors):
    print("layer     max |value|  scale, least .. largest    SQNR  saturated  codes used")
    for layer in range(errors["k"].signal.shape[0]):
        for name in "kv":
            largest = float(ranges[name].absolute_maximum()[layer].max())
            scale = np.asarray(calibrations[name].scale[layer])
            report = errors[name].layer(layer).total()
            print(
                f"{layer:5} {name}  {largest:13.2f}  {scale.min():9.5f} .. {scale.max():9.5f}  "
                f"{float(report.sqnr):6.1f} dB  {float(report.saturation_rate):8.3%}  "
                f"{float(report.code_usage):10.1%}"
            )


def _output(arguments):
    """Where the scales go: a file that is written at the end, or the name of an empty folder."""
    is_file = arguments.format in kv_scales.FILES
    return output_file(arguments.out) if is_file else output_folder(arguments.out)


def _scales_of(calibrations):
    return {
        f"{parameter}_{name}": np.asarray(value)
        for name, calibration in calibrations.items()
        for parameter, value in calibration._asdict().items()
        if value is not None
    }


def _as_written(calibrations, arguments):
    """What a reader of the file gets, so that its cost is measured and not another's."""
    scales = kv_scales.as_format_holds(_scales_of(calibrations), arguments.format, arguments.reduce)
    arrays = {name: jnp.asarray(value) for name, value in scales.items()}
    return {
        name: numerics.Calibration(arrays[f"scale_{name}"], arrays.get(f"offset_{name}"))
        for name in calibrations
    }


def _save(out, model, calibrations, arguments):
    scales = cache_params_of_files(model, _scales_of(calibrations))
    try:
        kv_scales.write_kv_scales(out, scales, arguments.format, reduce=arguments.reduce)
    except ValueError as error:  # by now the folder has files
        raise CommandError(str(error)) from error


def _plot(pyplot, ranges, calibrations):
    """Draws a panel per layer and tensor: each channel's range as seen, and as the codes reach."""
    layers = calibrations["k"].scale.shape[0]
    _, axes = pyplot.subplots(
        layers, 2, figsize=(10, 1.9 * layers), sharex=True, layout="constrained", squeeze=False
    )
    for column, name in enumerate("kv"):
        seen = ranges[name]
        for layer, axis in enumerate(axes[:, column]):
            scale, offset = (
                0.0 if p is None else np.asarray(p[layer]).reshape(-1) for p in calibrations[name]
            )
            low, high = (np.asarray(a[layer]).reshape(-1) for a in (seen.low, seen.high))
            x = np.arange(low.size)
            axis.bar(x, high - low, bottom=low, width=1, color=_COLORS[name], label="seen")
            for code in (-128, 127):
                label = "first and last code" if code < 0 else None
                axis.step(x, (code - offset) * scale, "k", where="mid", lw=0.8, label=label)
            axis.set_ylabel(f"layer {layer}\n{name.upper()} value")
        axes[-1, column].set_xlabel("channel (head by head)")
        axes[0, column].set_title({"k": "K after RoPE", "v": "V"}[name], loc="left")
    for column in range(2):
        handles, labels = axes[0, column].get_legend_handles_labels()
        axes[0, column].legend(
            handles, labels, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize="small"
        )
