"""`python -m jax_kvcache bench`: the operator's time beside what bounds it from below and above."""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jax_kvcache import _ffi
from jax_kvcache.cli import CommandError
from jax_kvcache.cli import bench_cases as cases
from jax_kvcache.cli.output import figure_file

ROTATED_BYTES = 256 << 20  # several last-level caches: buffers this far apart come from memory
ROUND_SECONDS = 0.01  # one contestant's share of a round; long enough for the clock
CACHE_FACTOR = 16
PLOTTED = ("ffi", "xla", "obvious", "empty", "memcpy")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "bench",
        help="time of the operator on this CPU, beside an empty call and memcpy",
        description="Medians of interleaved repeats, in microseconds per call. ffi: the native "
        "kernel. xla: the jax.numpy reference. obvious: jax.numpy code that writes rows of the "
        "reshaped cache, which copies it. empty: a custom call with the same operands and results "
        "that does nothing, the cost of any call. memcpy: copies N bytes, N being what the "
        "operator reads and writes together; half_memcpy: copies N/2, so that it reads and writes "
        "N together. ffi_16x: the kernel with a cache 16 times larger. net: less the empty call.",
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        metavar="NAME",
        choices=list(cases.CASES),
        help=f"some of {', '.join(cases.CASES)} (default: all)",
    )
    parser.add_argument("--rounds", type=int, default=15, help="repeats (default: 15)")
    parser.add_argument(
        "--rotate", action="store_true", help="inputs from main memory, not from the CPU's caches"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", metavar="FILE", help="write a bar chart")
    parser.set_defaults(run=run)


class Contestant:
    """One thing that is timed: a step, the state it donates to itself, and its inputs in turn."""

    def __init__(self, step: Callable, state, inputs: list):
        """Compiles and warms up, and finds how many calls fill `ROUND_SECONDS`."""
        self.step, self.state, self.inputs, self.turn = step, state, inputs, 0
        self.seconds: list[float] = []
        self.calls = 1
        for _ in range(2 + len(inputs)):
            self._call()
        start = time.perf_counter()
        self._call()
        self.calls = max(1, min(500, int(ROUND_SECONDS / (time.perf_counter() - start))))

    def _call(self):
        inputs = self.inputs[self.turn % len(self.inputs)]
        self.turn += 1
        outputs, self.state = self.step(self.state, inputs)
        jax.block_until_ready((outputs, self.state))

    def round(self):
        """Times a few calls."""
        start = time.perf_counter()
        for _ in range(self.calls):
            self._call()
        self.seconds.append((time.perf_counter() - start) / self.calls)

    def median(self) -> float:
        """Microseconds per call."""
        return 1e6 * statistics.median(self.seconds)


def _copies(nbytes: int, count: int, seed: int) -> list[jax.Array]:
    return [jnp.full(nbytes, seed + i, jnp.uint8) for i in range(count)]


def _contestants(case: cases.Case, rotate: bool) -> dict[str, Contestant]:
    nbytes = case.bytes_moved
    sets = 1 + (ROTATED_BYTES // nbytes if rotate else 0)
    inputs = [cases.make_inputs(case, seed) for seed in range(min(sets, 64))]
    steps = cases.steps(case)
    found = {
        name: Contestant(step, cases.make_caches(case), inputs) for name, step in steps.items()
    }
    field = "C1" if case.cache_mode == "page" else "C2"
    larger = case._replace(**{field: CACHE_FACTOR * getattr(case, field)})
    found["ffi_16x"] = Contestant(steps["ffi"], cases.make_caches(larger), inputs)
    for name, size in (("memcpy", nbytes), ("half_memcpy", nbytes // 2), ("memcpy_empty", 64)):
        step = jax.jit(
            functools.partial(cases.memcpy, threads=_ffi.worth_threads(nbytes)), donate_argnums=0
        )
        found[name] = Contestant(step, jnp.zeros(size, jnp.uint8), _copies(size, len(inputs), 1))
    return found


def measure(case: cases.Case, rounds: int, rotate: bool = False, progress=None) -> dict:
    """Times every contestant on one shape.

    Args:
      case: the shape.
      rounds: interleaved repeats of which the median is taken.
      rotate: whether inputs come from memory instead of the CPU's caches.
      progress: called after every round.

    Returns:
      Microseconds per contestant, bytes, GB/s and the ratios.
    """
    found = _contestants(case, rotate)
    for _ in range(rounds):
        for contestant in found.values():
            contestant.round()
        if progress:
            progress()
    us = {name: contestant.median() for name, contestant in found.items()}
    net = us["ffi"] - us["empty"]
    return {
        "microseconds": us,
        "bytes": case.bytes_moved,
        "threads": _ffi.worth_threads(case.bytes_moved),
        "gigabytes_per_second": case.bytes_moved / us["ffi"] / 1e3,
        "ratios": {
            "net/memcpy": net / (us["memcpy"] - us["memcpy_empty"]),
            "net/half_memcpy": net / (us["half_memcpy"] - us["memcpy_empty"]),
            "ffi/empty": us["ffi"] / us["empty"],
            "ffi/xla": us["ffi"] / us["xla"],
            "obvious/ffi": us["obvious"] / us["ffi"],
            "ffi_16x/ffi": us["ffi_16x"] / us["ffi"],
        },
    }


def run(arguments: argparse.Namespace) -> None:
    """Measures and prints."""
    if arguments.rounds < 1:
        raise CommandError(f"`--rounds` must be at least 1, got {arguments.rounds}.")
    if reason := _ffi.unavailable("cpu"):
        raise CommandError(f"nothing to measure: {reason}.")
    if jax.default_backend() != "cpu":
        raise CommandError("the benchmark is of the CPU kernel: set JAX_PLATFORMS=cpu.")
    for name in (cases.EMPTY, cases.MEMCPY):
        _ffi.register(name, name, "cpu")
    with figure_file(arguments.plot) as pyplot:
        report = _measure_all(arguments)
        if pyplot is not None:
            _plot(pyplot, report["shapes"])
    print(json.dumps(report, indent=2) if arguments.json else _table(report))


def _measure_all(arguments: argparse.Namespace) -> dict:
    names = arguments.shape or list(cases.CASES)
    results = {}
    with tqdm(total=len(names) * arguments.rounds, unit="round", leave=False) as bar:
        for name in names:
            bar.set_description(name)
            results[name] = measure(
                cases.CASES[name], arguments.rounds, arguments.rotate, lambda: bar.update()
            )
    return {"simd": _ffi.simd(), "rotate": arguments.rotate, "shapes": results}


def _table(report: dict) -> str:
    """The report as text: a line of times and a line of ratios per shape."""
    lines = [f"microseconds per call (median); {report['simd']}"]
    for name, result in report["shapes"].items():
        lines.append(
            f"\n{name}: {result['bytes'] / 1e6:.2f} MB on {result['threads']} threads, "
            f"{result['gigabytes_per_second']:.1f} GB/s"
        )
        lines.append("  " + "  ".join(f"{k} {v:.1f}" for k, v in result["microseconds"].items()))
        lines.append("  " + "  ".join(f"{k} {v:.2f}" for k, v in result["ratios"].items()))
    return "\n".join(lines)


def _plot(pyplot, results: dict[str, dict]) -> None:
    """Draws a bar chart of the times, one group of bars per shape."""
    shapes = list(results)
    width = 0.8 / len(PLOTTED)
    _, axes = pyplot.subplots(figsize=(1.5 * len(shapes) + 4, 5), layout="constrained")
    for i, name in enumerate(PLOTTED):
        times = [results[shape]["microseconds"][name] for shape in shapes]
        axes.bar([j + i * width for j in range(len(shapes))], times, width, label=name)
    axes.set_yscale("log")
    axes.set_ylabel("microseconds per call")
    axes.set_xticks(
        [j + 0.4 - width / 2 for j in range(len(shapes))], shapes, rotation=30, ha="right"
    )
    axes.legend()
