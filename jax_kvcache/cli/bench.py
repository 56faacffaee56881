"""`python -m jax_kvcache bench`: the operator's time beside what bounds it from below and above."""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jax_kvcache import backends
from jax_kvcache.backends import library
from jax_kvcache.cli import CommandError, bench_gpu, bench_steps
from jax_kvcache.cli import bench_cases as cases
from jax_kvcache.cli.output import figure_file
from jax_kvcache.ops.dequant_rope_quant_kvcache.primitive import NAME

ROTATED_BYTES = 256 << 20  # several last-level caches: buffers this far apart come from memory
ROUND_SECONDS = 0.01  # one contestant's share of a round; long enough for the clock
CACHE_FACTOR = 16
PLOTTED = ("ffi", "xla", "obvious", "empty", "memcpy")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "bench",
        help="time of the operator on this CPU, beside an empty call and memcpy",
        description="Medians of interleaved repeats, in microseconds per call, and of the ratios "
        "within each repeat. ffi: the native "
        "kernel. xla: the jax.numpy reference. obvious: jax.numpy code that writes rows of the "
        "reshaped cache, which copies it. empty: a custom call with the same operands and results "
        "that does nothing, the cost of any call. memcpy: the same call, copying N bytes on as "
        "many threads as the kernel uses, N being what the operator reads and writes together; "
        "half_memcpy: copies N/2, so that it reads and writes N together. ffi_16x: the kernel with "
        "a cache 16 times larger. net: less the empty call. On an NVIDIA GPU instead: both "
        "operators, native and by XLA, the native kernels' own time, and cuDNN's attention over a "
        "bfloat16 cache.",
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
        self.faults: list[float] = []
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
        """Times a few calls, after one that finds the caches as it leaves them."""
        self._call()
        faults = _page_faults()
        start = time.perf_counter()
        for _ in range(self.calls):
            self._call()
        self.seconds.append((time.perf_counter() - start) / self.calls)
        self.faults.append((_page_faults() - faults) / self.calls)

    def median(self) -> float:
        """Microseconds per call."""
        return 1e6 * statistics.median(self.seconds)

    def page_faults(self) -> float:
        """Pages per call that the system had to find: results in memory fresh from malloc."""
        return statistics.median(self.faults)


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _contestants(case: cases.Case, rotate: bool) -> dict[str, Contestant]:
    sets = 1 + (ROTATED_BYTES // case.bytes_moved if rotate else 0)
    inputs = [cases.make_inputs(case, seed) for seed in range(min(sets, 64))]
    steps = bench_steps.steps(case)
    field = "C1" if case.cache_mode == "page" else "C2"
    larger = case._replace(**{field: CACHE_FACTOR * getattr(case, field)})
    found = {
        "ffi": Contestant(steps["ffi"], cases.make_caches(case), inputs),
        "ffi_16x": Contestant(steps["ffi"], cases.make_caches(larger), inputs),
    }
    if case.form == "call":
        found["empty"] = Contestant(steps["empty"], cases.make_caches(case), inputs)
        step = bench_steps.memcpy_step(case, library.worth_threads(case.bytes_per_native_call))
        for name, size in (("memcpy", case.bytes_moved), ("half_memcpy", case.bytes_moved // 2)):
            state = cases.make_caches(case), jnp.zeros(size, jnp.uint8)
            copied = [(values, jnp.full(size, i, jnp.uint8)) for i, values in enumerate(inputs)]
            found[name] = Contestant(step, state, copied)
    for name in [n for n in steps if n not in found]:
        found[name] = Contestant(steps[name], cases.make_caches(case), inputs)
    return found


def measure(case: cases.Case, rounds: int, rotate: bool = False, progress=None) -> dict:
    """Times every contestant on one shape.

    Args:
      case: the shape.
      rounds: interleaved repeats of which the median is taken.
      rotate: whether inputs come from memory instead of the CPU's caches.
      progress: called after every round.

    Returns:
      Microseconds per contestant, bytes, GB/s, page faults per call of the kernel, and the ratios.
    """
    found = _contestants(case, rotate)
    order = list(found.values())
    for _ in range(rounds):
        for contestant in order:
            contestant.round()
        order.reverse()  # nobody always comes after the one that copies hundreds of megabytes
        if progress:
            progress()
    times = [{name: c.seconds[i] for name, c in found.items()} for i in range(rounds)]

    def ratio(of: Callable[[dict[str, float]], float]) -> float:
        """The median over rounds: what is compared ran within the same fraction of a second."""
        return statistics.median(map(of, times))

    ratios = {
        "ffi/xla": ratio(lambda t: t["ffi"] / t["xla"]),
        "ffi_16x/ffi": ratio(lambda t: t["ffi_16x"] / t["ffi"]),
    }
    if case.form == "call":

        def net(name):
            return ratio(lambda t: (t["ffi"] - t["empty"]) / (t[name] - t["empty"]))

        ratios = {
            "net/memcpy": net("memcpy"),
            "net/half_memcpy": net("half_memcpy"),
            "ffi/empty": ratio(lambda t: t["ffi"] / t["empty"]),
            **ratios,
            "obvious/ffi": ratio(lambda t: t["obvious"] / t["ffi"]),
        }
    us = {name: contestant.median() for name, contestant in found.items()}
    return {
        "microseconds": us,
        "bytes": case.bytes_moved,
        "threads": library.worth_threads(case.bytes_per_native_call),
        "gigabytes_per_second": case.bytes_moved / us["ffi"] / 1e3,
        "page_faults": found["ffi"].page_faults(),
        "ratios": ratios,
    }


def run(arguments: argparse.Namespace) -> None:
    """Measures and prints."""
    if arguments.rounds < 1:
        raise CommandError(f"`--rounds` must be at least 1, got {arguments.rounds}.")
    if jax.default_backend() == "gpu":
        bench_gpu.report(arguments.rounds, arguments.json)
        return
    if reason := backends.unavailable("cpu", NAME):
        raise CommandError(f"nothing to measure: {reason}.")
    if jax.default_backend() != "cpu":
        raise CommandError("the benchmark is of CPUs and NVIDIA GPUs: set JAX_PLATFORMS=cpu.")
    bench_steps.register_comparisons()
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
    return {"simd": library.simd(), "rotate": arguments.rotate, "shapes": results}


def _table(report: dict) -> str:
    """The report as two tables with a row per shape: times, and ratios."""
    shapes = report["shapes"]
    times = {
        name: {
            "MB": f"{result['bytes'] / 1e6:.2f}",
            "threads": str(result["threads"]),
            "GB/s": f"{result['gigabytes_per_second']:.1f}",
            "faults": f"{result['page_faults']:.0f}",
            **{k: f"{v:,.1f}" for k, v in result["microseconds"].items()},
        }
        for name, result in shapes.items()
    }
    ratios = {
        name: {k: f"{v:.2f}" for k, v in result["ratios"].items()}
        for name, result in shapes.items()
    }
    return "\n".join(
        [
            f"microseconds per call, medians; {report['simd']}; bytes moved, and the kernel's "
            "threads, GB/s and page faults per call",
            *_rows(times),
            "",
            "ratios, medians of those within a round",
            *_rows(ratios),
        ]
    )


def _rows(cells: dict[str, dict[str, str]]) -> list[str]:
    """Lines of a table: a header, then a row per key; "-" where a row has no such column."""
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    lines = [["", *columns]]
    lines += [[name, *(row.get(c, "-") for c in columns)] for name, row in cells.items()]
    first, *others = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([f"{name:{first}}", *(f"{t:>{w}}" for t, w in zip(texts, others, strict=True))])
        for name, *texts in lines
    ]


def _plot(pyplot, results: dict[str, dict]) -> None:
    """Draws a bar chart of the times, one group of bars per shape."""
    shapes = list(results)
    width = 0.8 / len(PLOTTED)
    _, axes = pyplot.subplots(figsize=(1.5 * len(shapes) + 4, 5), layout="constrained")
    for i, name in enumerate(PLOTTED):
        times = [results[shape]["microseconds"].get(name, 0) for shape in shapes]
        axes.bar([j + i * width for j in range(len(shapes))], times, width, label=name)
    axes.set_yscale("log")
    axes.set_ylabel("microseconds per call")
    axes.set_xticks(
        [j + 0.4 - width / 2 for j in range(len(shapes))], shapes, rotation=30, ha="right"
    )
    axes.legend()
