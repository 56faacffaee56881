"""What a command does when a file, the output or an option cannot be used: one line, no traceback.

More options are in test_cli.py; these need a prepared file, stream or process.
"""

import contextlib
import io
import os
import re
import sys
import types
import zipfile

import numpy as np
import pytest

from jax_kvcache import __main__
from jax_kvcache.__main__ import main
from jax_kvcache.cli import CommandError, bench, calibrate
from jax_kvcache.cli.output import figure_file, output_file

SCALES = {
    f"layers.{i}.{n}": np.full((2, 64), 0.1, np.float32)
    for i in range(4)
    for n in ("scale_k", "scale_v")
}
KEY = "layers.2.scale_v"


def error_of(command, capsys):
    """The one line that a command refuses with."""
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def closed_pipe():
    read, write = os.pipe()
    os.close(read)
    return write


@pytest.mark.parametrize("command", [["info"], ["--help"]])
def test_a_reader_that_has_gone_is_no_error(command, capsys, monkeypatch):
    with open(closed_pipe(), "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(command) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", [["info"], ["--help"]])
def test_a_full_disk_is_one_line(command, capsys, monkeypatch):
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(command) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


def test_an_ascii_terminal_gets_question_marks(monkeypatch):
    def add_parser(subparsers):
        subparsers.add_parser("write").set_defaults(run=lambda _: print("é"))

    monkeypatch.setattr(__main__, "COMMANDS", [types.SimpleNamespace(add_parser=add_parser)])
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["write"]) == 0
    assert stream.buffer.getvalue() == b"?\n"


def write_member(path, name, data, **how):
    """The scales, with one member replaced by these bytes."""
    np.savez(path, **{key: array for key, array in SCALES.items() if f"{key}.npy" != name})
    with zipfile.ZipFile(path, "a", **how) as file:
        file.writestr(name, data)


def npy():
    file = io.BytesIO()
    np.save(file, SCALES[KEY])
    return file.getvalue()


def flipped(path):
    write_member(path, f"{KEY}.npy", npy())
    content = bytearray(path.read_bytes())
    content[content.rindex(npy()) + 200] ^= 1
    path.write_bytes(content)


def corrupt_deflate(path):
    write_member(path, f"{KEY}.npy", npy(), compression=zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    start = content.index(f"{KEY}.npy".encode()) + len(KEY) + 4
    content[start : start + 8] = b"\xff" * 8
    path.write_bytes(content)


def encrypted(path):
    write_member(path, f"{KEY}.npy", npy())
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x03\x04") + 6] |= 1
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


def not_npy(path):
    write_member(path, KEY, b"0.1 0.2")


def too_large(path):
    header = io.BytesIO()
    facts = {"descr": "<f4", "fortran_order": False, "shape": (2**60,)}  # 4 EiB
    np.lib.format.write_array_header_1_0(header, facts)
    write_member(path, f"{KEY}.npy", header.getvalue())


def objects(path):
    np.savez(path, **SCALES | {KEY: np.full((2, 64), None)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flipped, "Bad CRC-32"),
        (corrupt_deflate, "Error -3 while decompressing"),
        (encrypted, "encrypted"),
        (not_npy, "it is not in .npy format"),
        (too_large, "Unable to allocate|array is too big|Maximum allowed"),
        (objects, "Object arrays cannot be loaded"),
    ],
)
def test_damaged_scales(damage, message, tmp_path, capsys):
    path = tmp_path / "scales.npz"
    damage(path)
    error = error_of(["demo", "--scales", str(path)], capsys)
    assert error.startswith(f"error: cannot read `{KEY}` of '{path}': ")
    assert re.search(message, error), error


@pytest.mark.parametrize("value", [np.nan, 0, -0.1, np.inf, 1e-40])
def test_scales_that_are_no_scales(value, tmp_path, capsys):
    path = tmp_path / "scales.npz"
    array = SCALES[KEY].copy()
    array[1, 3] = value
    np.savez(path, **SCALES | {KEY: array})
    error = error_of(["demo", "--scales", str(path)], capsys)
    assert (
        f"`{KEY}` must be finite, normal and above 0, got {np.float32(value)} in '{path}'" in error
    )


@pytest.mark.parametrize(("given", "missing"), ["kv", "vk"])
def test_offsets_come_in_pairs_and_are_finite(given, missing, tmp_path, capsys):
    path = tmp_path / "scales.npz"
    offsets = {f"layers.{i}.offset_{given}": np.full((2, 64), -3, np.float32) for i in range(4)}
    np.savez(path, **SCALES, **offsets)
    error = error_of(["demo", "--scales", str(path)], capsys)
    assert f"'{path}' has offset_{given} without offset_{missing}" in error
    offsets[f"layers.3.offset_{given}"][0, 0] = np.nan
    np.savez(path, **SCALES, **offsets)
    error = error_of(["demo", "--scales", str(path)], capsys)
    assert f"`layers.3.offset_{given}` must be finite, got nan" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "{tmp}"], "cannot write '{tmp}': Is a directory"),
        (["--out", ""], "cannot write '': No such file or directory"),
        (["--out", "{tmp}/no/x"], "cannot write '{tmp}/no/x': No such file or directory"),
        (["--out", "{tmp}/out", "--plot", "{tmp}"], "cannot write '{tmp}': Is a directory"),
        (["--out", "{tmp}/out", "--plot", ""], "cannot write '': No such file or directory"),
        (["--out", "{tmp}/out", "--plot", "x.xyz"], "cannot write 'x.xyz': a figure may end in "),
        (
            ["--out", "{tmp}/text/new", "--format", "ascend_v1"],
            "cannot write '{tmp}/text/new': Not a directory",
        ),
        (["--out", "{tmp}", "--format", "ascend_v1"], "cannot write '{tmp}': Directory not empty"),
        (
            ["--out", "{tmp}/text", "--format", "ascend_v1"],
            "cannot write '{tmp}/text': Not a directory",
        ),
        (["--out", "{tmp}/out", "--format", "compressed_tensors"], "add `--reduce max`"),
        (["--out", "{tmp}/out", "--format", "onnxruntime", "--asymmetric"], "omit `--asymmetric`"),
        (
            [
                "--out",
                "{tmp}/out",
                "--format",
                "compressed_tensors",
                "--reduce",
                "max",
                "--asymmetric",
            ],
            "`--format compressed_tensors` holds no offsets: omit `--asymmetric`",
        ),
    ],
)
def test_calibrate_refuses_before_it_works(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "model_from", None)  # the work starts with it
    text = tmp_path / "text"
    text.write_bytes(b"some text")
    options = [option.format(tmp=tmp_path) for option in options]
    error = error_of(["calibrate", str(text), *options], capsys)
    assert message.format(tmp=tmp_path) in error
    assert os.listdir(tmp_path) == ["text"]


def test_bench_refuses_before_it_works(capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", None)
    assert "`--rounds` must be at least 1, got 0" in error_of(["bench", "--rounds", "0"], capsys)
    error = error_of(["bench", "--plot", "nope/x.png"], capsys)
    assert "cannot write 'nope/x.png': No such file or directory" in error


@pytest.mark.parametrize("where", ["a GPU", "`--ascend-host`"])
@pytest.mark.parametrize("option", [["--shape", "documented"], ["--rotate"], ["--plot", "x.png"]])
def test_bench_refuses_options_of_the_cpu_elsewhere(where, option, capsys, monkeypatch):
    monkeypatch.setattr(bench, "bench_gpu", None)
    monkeypatch.setattr(bench, "bench_ascend", None)
    if where == "a GPU":
        monkeypatch.setattr(bench.jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(bench.cuda, "is_here", lambda: True)
        command = ["bench", *option]
    else:
        command = ["bench", "--ascend-host", *option]
    error = error_of(command, capsys)
    assert f"the benchmark of {where} does not take `{option[0]}`: leave it out." in error


def test_bench_takes_no_other_gpu_for_nvidias(capsys, monkeypatch):
    monkeypatch.setattr(bench.jax, "default_backend", lambda: "gpu")
    assert "the benchmark is of CPUs and NVIDIA GPUs" in error_of(["bench"], capsys)


def test_temperatures_beyond_float32(capsys):
    error = error_of(["demo", "--temperature", "1e39"], capsys)
    assert "`--temperature` must be 0 or more and finite in float32, got 1e+39" in error


def test_a_file_without_a_name(capsys):
    assert "cannot read '': No such file or directory" in error_of(["eval", ""], capsys)


def test_an_output_is_written_whole_or_not_at_all(tmp_path):
    path, link = tmp_path / "out", tmp_path / "link"
    link.symlink_to(path)
    with output_file(str(link)) as file:
        file.write(b"first")
        assert not path.exists()
    with contextlib.suppress(KeyError), output_file(str(path)) as file:
        file.write(b"second")
        raise KeyError
    assert path.read_bytes() == b"first"
    assert sorted(os.listdir(tmp_path)) == ["link", "out"]
    full = pytest.raises(CommandError, match="cannot write '/dev/full': No space left on device")
    with full, output_file("/dev/full") as file:
        file.write(b"third")


def test_a_figure_may_have_any_name(tmp_path):
    for name, magic in (("plot", b"\x89PNG"), ("plot.PDF", b"%PDF")):
        with figure_file(str(tmp_path / name)) as pyplot:
            pyplot.plot([1, 2])
        assert (tmp_path / name).read_bytes().startswith(magic)
