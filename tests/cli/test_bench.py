"""The benchmark command: its report, its plot, its refusals; not its numbers."""

import json

import jax
import numpy as np
import pytest
from support.internals import library

from jax_kvcache import __main__
from jax_kvcache.cli import bench, bench_attention, bench_cases, bench_steps, bench_timing

OF_ALL, OF_CALLS = {"ffi", "xla", "ffi_16x"}, {"obvious", "empty", "memcpy", "half_memcpy"}
SMALL = bench_cases.Case(3, 1, 2, 1, 64, "contiguous", 3, 4)


@pytest.fixture
def small(monkeypatch):
    cases = {
        "small": SMALL,
        "page": SMALL._replace(S=2, cache_mode="page", C1=5),
        "vmap": SMALL._replace(form="vmap", calls=2),
        "layers": SMALL._replace(form="layers", calls=2),
    }
    monkeypatch.setattr(bench_cases, "CASES", cases)
    reads = {"read": bench_attention.AttentionCase(2, 40, Nq=4, Nkv=2)}
    monkeypatch.setattr(bench, "ATTENTION_CASES", reads)
    monkeypatch.setattr(bench_timing, "ROUND_SECONDS", 1e-4)
    monkeypatch.setattr(bench, "ROTATED_BYTES", 20_000)


def run(*arguments):
    return __main__.main(["bench", "--rounds", "1", *arguments])


def test_json(small, capsys):
    assert run("--json", "--rotate") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["simd"] == library.simd()
    assert list(report["shapes"]) == ["small", "page", "vmap", "layers", "read"]
    read = report["shapes"].pop("read")
    assert {"ffi", "xla", "bfloat16", "float32", "read", "step ffi"} <= set(read["microseconds"])
    assert read["bytes"] == 2 * 2 * 40 * 2 * 128
    for name, shape in report["shapes"].items():
        times = shape["microseconds"]
        assert set(times) == (OF_ALL | OF_CALLS if name in ("small", "page") else OF_ALL)
        assert all(time > 0 for time in times.values())
        assert shape["ratios"]["ffi/xla"] == pytest.approx(times["ffi"] / times["xla"])
        assert shape["page_faults"] >= 0
    # 3 tokens of 256 columns: int32 in, bfloat16 and two int8 rows out; tables, slots, parameters.
    tokens = 3 * (4 * 256 + 2 * 2 * 64 + 4 + 4 + 2 * 256 + 2 * 64)
    small = tokens + 4 * (2 * 256 + 4 * 64)
    assert report["shapes"]["small"]["bytes"] == small
    assert report["shapes"]["vmap"]["bytes"] == 2 * small
    # a layered cache's update returns q alone
    assert report["shapes"]["layers"]["bytes"] == 2 * (small - 3 * 2 * 2 * 64)


def test_bytes_per_native_call():
    for form, divisor in (("call", 1), ("vmap", 1), ("layers", 4)):
        case = SMALL._replace(form=form, calls=1 if form == "call" else 4)
        assert case.bytes_per_native_call * divisor == case.bytes_moved


def test_text_and_plot(small, capsys, tmp_path):
    assert run("--shape", "small", "vmap", "--plot", str(tmp_path / "bench.png")) == 0
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    times, ratios = capsys.readouterr().out.split("\n\n")
    for table, columns in ((times, 4 + len(OF_ALL | OF_CALLS)), (ratios, 6)):
        header, small_row, vmap_row = (line.split() for line in table.splitlines()[1:])
        assert len(header) == columns == len(small_row) - 1 == len(vmap_row) - 1
        assert len({len(line) for line in table.splitlines()[1:]}) == 1  # columns are aligned
        assert vmap_row.count("-") == 4  # what only single calls are compared with
    assert "net/memcpy" in ratios


def test_unknown_shape(capsys):
    with pytest.raises(SystemExit):
        run("--shape", "nothing")
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


def test_without_the_library(monkeypatch, capsys):
    gone = library.Library(None, "it was left at home")
    monkeypatch.setattr(library, "load", lambda: gone)
    assert run("--shape", "documented") == 2
    assert "nothing to measure: it was left at home." in capsys.readouterr().err


def shrunk(name):
    case = bench_cases.CASES[name]
    return case._replace(B=2, S=min(case.S, 3), C1=2, C2=8)


def results_of(case, names):
    inputs, steps = bench_cases.make_inputs(case, 0), bench_steps.steps(case)
    return [
        jax.tree.leaves(jax.tree.map(np.asarray, steps[n](bench_cases.make_caches(case), inputs)))
        for n in names
    ]


@pytest.mark.parametrize("name", bench_cases.CASES)
def test_ffi_and_xla_do_the_same_work(name):
    ffi, xla = results_of(shrunk(name), ("ffi", "xla"))
    jax.tree.map(np.testing.assert_array_equal, ffi, xla)


@pytest.mark.parametrize("name", ["documented", "llama3-8b-b1", "llama3-8b-prefill-1024"])
def test_the_obvious_code_does_the_same_work(name):
    """To within a rounding."""
    for ffi, obvious in zip(*results_of(shrunk(name), ("ffi", "obvious")), strict=True):
        step = 1 if ffi.dtype == np.int8 else 0.05
        np.testing.assert_allclose(
            obvious.astype(np.float32), ffi.astype(np.float32), atol=step, rtol=0.02
        )


def test_memcpy_copies():
    bench_steps.register_comparisons()
    size = 200_000  # more than one part, and not a whole number of them
    source = np.arange(size, dtype=np.uint8)
    state = bench_cases.make_caches(SMALL), jax.numpy.zeros(size, np.uint8)
    step = bench_steps.memcpy_step(SMALL, 2)
    _, (caches, destination) = step(state, (bench_cases.make_inputs(SMALL, 0), source))
    np.testing.assert_array_equal(destination, source)
    jax.tree.map(np.testing.assert_array_equal, caches, bench_cases.make_caches(SMALL))
