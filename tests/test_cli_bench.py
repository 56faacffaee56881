"""The benchmark command: its report, its plot, its refusals; not its numbers."""

import json

import jax
import numpy as np
import pytest

from jax_kvcache import __main__, _ffi
from jax_kvcache.cli import bench, bench_cases

SMALL = bench_cases.Case(3, 1, 2, 1, 64, "contiguous", 3, 4)


@pytest.fixture
def small(monkeypatch):
    cases = {"small": SMALL, "page": SMALL._replace(S=2, cache_mode="page", C1=5)}
    monkeypatch.setattr(bench_cases, "CASES", cases)
    monkeypatch.setattr(bench, "ROUND_SECONDS", 1e-4)
    monkeypatch.setattr(bench, "ROTATED_BYTES", 20_000)


def run(*arguments):
    return __main__.main(["bench", "--rounds", "1", *arguments])


def test_json(small, capsys):
    assert run("--json", "--rotate") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["simd"] == _ffi.simd()
    assert list(report["shapes"]) == ["small", "page"]
    for shape in report["shapes"].values():
        times = shape["microseconds"]
        assert set(times) >= {"ffi", "xla", "obvious", "empty", "memcpy", "half_memcpy", "ffi_16x"}
        assert all(time > 0 for time in times.values())
        assert shape["ratios"]["ffi/xla"] == pytest.approx(times["ffi"] / times["xla"])
    # 3 tokens of 256 columns: int32 in, bfloat16 and two int8 rows out; tables, slots, parameters.
    tokens = 3 * (4 * 256 + 2 * 2 * 64 + 4 + 4 + 2 * 256 + 2 * 64)
    assert report["shapes"]["small"]["bytes"] == tokens + 4 * (2 * 256 + 4 * 64)


def test_text_and_plot(small, capsys, tmp_path):
    assert run("--shape", "small", "--plot", str(tmp_path / "bench.png")) == 0
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert "small: " in text and "net/memcpy" in text  # noqa: PT018


def test_unknown_shape(capsys):
    with pytest.raises(SystemExit):
        run("--shape", "nothing")
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


def test_without_the_library(monkeypatch, capsys):
    monkeypatch.setattr(_ffi, "_missing", "it was left at home")
    assert run("--shape", "documented") == 2
    assert "nothing to measure: it was left at home." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["documented", "llama3-8b-b1", "llama3-8b-prefill-1024"])
def test_contestants_do_the_same_work(name):
    """ffi and xla agree to the bit, the obvious code to within a rounding."""
    case = bench_cases.CASES[name]._replace(B=2, S=min(bench_cases.CASES[name].S, 3), C1=2, C2=8)
    inputs = bench_cases.make_inputs(case, 0)
    steps = bench_cases.steps(case)
    results = {
        name: jax.tree.map(np.asarray, steps[name](bench_cases.make_caches(case), inputs))
        for name in ("ffi", "xla", "obvious")
    }
    for ffi, xla, obvious in zip(*map(jax.tree.leaves, results.values()), strict=True):
        np.testing.assert_array_equal(ffi, xla)
        step = 1 if ffi.dtype == np.int8 else 0.05
        np.testing.assert_allclose(
            obvious.astype(np.float32), ffi.astype(np.float32), atol=step, rtol=0.02
        )
