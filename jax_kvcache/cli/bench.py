"""`python -m jax_kvcache bench`: the operator's time beside what bounds it from below and above."""

import argparse
import json

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jax_kvcache import backends
from jax_kvcache.backends import cuda, library
from jax_kvcache.cli import CommandError, bench_ascend, bench_attention, bench_gpu, bench_steps
from jax_kvcache.cli import bench_cases as cases
from jax_kvcache.cli.bench_attention import ATTENTION_CASES, AttentionCase
from jax_kvcache.cli.bench_table import table
from jax_kvcache.cli.bench_timing import Contestant, Rounds
from jax_kvcache.cli.output import figure_file
from jax_kvcache.ops.decode_attention.primitive import NAME as ATTENTION
from jax_kvcache.ops.dequant_rope_quant_kvcache.primitive import NAME as WRITE

ROTATED_BYTES = 256 << 20  # several last-level caches: buffers this far apart come from memory
CACHE_FACTOR = 16
PLOTTED = ("ffi", "xla", "obvious", "empty", "memcpy")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "bench",
        help="times of the write and of attention, beside what bounds them and other code",
        description="Medians of interleaved repeats, in microseconds per call, and of the ratios "
        "within each repeat. Of both operators: ffi is the native kernel, xla the jax.numpy "
        "reference. Of the write: obvious is jax.numpy code that writes rows of the "
        "reshaped cache, which copies it; empty a custom call with the same operands and results "
        "that does nothing, the cost of any call; memcpy the same call, copying N bytes on as "
        "many threads as the kernel uses, N being what the operator reads and writes together; "
        "half_memcpy copies N/2, so that it reads and writes N together; ffi_16x is the kernel "
        "with a cache 16 times larger; net means less the empty call. Of attention: read is a "
        "plain read of the codes in both caches; bfloat16 and float32 are "
        "jax.nn.dot_product_attention over caches of these dtypes; step means the whole step of "
        "one layer, the write and then attention, for each of these and for onnxruntime where it "
        "is installed. On an NVIDIA GPU instead: fixed shapes of both operators, native and by "
        "XLA, the kernels' own time, and cuDNN's attention over a bfloat16 cache.",
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        metavar="NAME",
        choices=[*cases.CASES, *ATTENTION_CASES],
        help=f"on CPUs, some of {', '.join([*cases.CASES, *ATTENTION_CASES])} (default: all)",
    )
    parser.add_argument("--rounds", type=int, default=15, help="repeats (default: 15)")
    parser.add_argument(
        "--rotate",
        action="store_true",
        help="inputs of the write from main memory, not from the CPU's caches",
    )
    parser.add_argument(
        "--ascend-host",
        action="store_true",
        help="instead: microseconds per call that the Ascend handler costs the host, on the "
        "stand-in device, with a CANN that does nothing",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", metavar="FILE", help="write a bar chart; on CPUs only")
    parser.set_defaults(run=run)


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
    times = Rounds(found, rounds, progress)
    ratio = times.ratio
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
    us = times.microseconds
    return {
        "operator": WRITE,
        "microseconds": us,
        "bytes": case.bytes_moved,
        "threads": library.worth_threads(case.bytes_per_native_call),
        "gigabytes_per_second": case.bytes_moved / us["ffi"] / 1e3,
        "page_faults": found["ffi"].page_faults(),
        "ratios": ratios,
    }


def measure_attention(case: AttentionCase, rounds: int, progress=None) -> dict:
    """Times every contestant on one shape of attention; see `measure`."""
    found = {
        name: Contestant(step, state, inputs)
        for name, (step, state, inputs) in bench_attention.contestants(case).items()
    }
    times = Rounds(found, rounds, progress)
    pairs = [("ffi", n) for n in ("read", "xla", "bfloat16", "float32")]
    pairs += [("step ffi", n) for n in found if n.startswith("step ") and n != "step ffi"]
    us = times.microseconds
    return {
        "operator": ATTENTION,
        "microseconds": us,
        "bytes": case.codes,
        "gigabytes_per_second": case.codes / us["ffi"] / 1e3,
        "ratios": {f"{a}/{b.removeprefix('step ')}": times.of(a, b) for a, b in pairs},
    }


def run(arguments: argparse.Namespace) -> None:
    """Measures and prints."""
    if arguments.rounds < 1:
        raise CommandError(f"`--rounds` must be at least 1, got {arguments.rounds}.")
    if arguments.ascend_host:
        _refuse_cpu_options(arguments, "`--ascend-host`")
        print(json.dumps({"ascend_host": bench_ascend.measure(arguments.rounds)}, indent=2))
        return
    if jax.default_backend() == "gpu" and cuda.is_here():  # ROCm's GPUs report "gpu" too
        _refuse_cpu_options(arguments, "a GPU")
        bench_gpu.report(arguments.rounds, arguments.json)
        return
    if reason := backends.unavailable("cpu", WRITE):
        raise CommandError(f"nothing to measure: {reason}.")
    if jax.default_backend() != "cpu":
        raise CommandError("the benchmark is of CPUs and NVIDIA GPUs: set JAX_PLATFORMS=cpu.")
    bench_steps.register_comparisons()
    with figure_file(arguments.plot) as pyplot:
        report = _measure_all(arguments)
        if pyplot is not None:
            _plot(pyplot, report["shapes"])
    print(json.dumps(report, indent=2) if arguments.json else table(report))


def _refuse_cpu_options(arguments: argparse.Namespace, where: str) -> None:
    """Raises where an option is given that only the benchmark of a CPU has."""
    given = {"--shape": arguments.shape, "--rotate": arguments.rotate, "--plot": arguments.plot}
    if names := " and ".join(f"`{name}`" for name, value in given.items() if value):
        raise CommandError(f"the benchmark of {where} does not take {names}: leave it out.")


def _measure_all(arguments: argparse.Namespace) -> dict:
    names = arguments.shape or [*cases.CASES, *ATTENTION_CASES]
    results: dict[str, dict] = {}
    with tqdm(total=len(names) * arguments.rounds, unit="round", leave=False) as bar:
        for name in names:
            bar.set_description(name)
            if name in ATTENTION_CASES:
                case = ATTENTION_CASES[name]
                results[name] = measure_attention(case, arguments.rounds, bar.update)
            else:
                write = cases.CASES[name]
                results[name] = measure(write, arguments.rounds, arguments.rotate, bar.update)
    return {"simd": library.simd(), "rotate": arguments.rotate, "shapes": results}


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
