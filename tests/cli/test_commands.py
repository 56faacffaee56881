"""The command line: what each command prints, and what bad input gets."""

import argparse
import inspect
import json
import pathlib
import re

import numpy as np
import pytest
from support import numpy_model, process

import jax_kvcache
from jax_kvcache.__main__ import main


def test_no_argument_is_help():
    written = process.run("-m", "jax_kvcache")
    assert written.startswith("usage: python -m jax_kvcache")
    for command in ("demo", "eval", "info"):
        assert f"    {command} " in written


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"jax_kvcache  {jax_kvcache.__version__}" in out
    assert "cpu:0" in out
    for platform in ("cpu", "gpu", "tpu", "ascend"):
        assert f"\n  ffi, {platform}" in out


def test_demo_writes_text_and_a_table(capsys):
    command = ["demo", "--prompt", "import numpy as n", "--tokens", "12", "--temperature", "0"]
    assert main(command) == 0
    text, table = capsys.readouterr().out.split("\n\ntokens/s")
    expected = numpy_model.logits(text.encode()[:-1], int8_cache=True).argmax(axis=1)
    assert len(text) == len(command[2]) + 12
    assert list(text.encode()[17:]) == expected[16:].tolist()
    table = " ".join(table.split())
    assert "cache bytes 266,240 with its scales; in bfloat16 524,288" in table
    assert "greedy as with a float cache 12 of 12 tokens lowering cpu: " in table


def test_demo_samples(capsys):
    def sample(seed):
        main(["demo", "--prompt", "import numpy as n", "--tokens", "12", "--seed", seed,
              "--temperature", "1"])  # fmt: skip
        return capsys.readouterr().out.split("\n\n")[0]

    assert sample("3") == sample("3")
    assert sample("3") != sample("4")


def test_eval_of_a_short_text_is_numpys(capsys, tmp_path):
    text = b"import os\n\n\ndef walk(top):\n    for name"
    path = tmp_path / "text.py"
    path.write_bytes(text)
    assert main(["eval", str(path)]) == 0
    captured = capsys.readouterr()
    line = json.loads(captured.out)
    assert captured.out.count("\n") == 1
    assert "eval" in captured.err
    assert list(line) == ["targets", "nll_int8_cache", "nll_float_cache"]
    assert line["targets"] == len(text) - 1
    assert line["nll_int8_cache"] == pytest.approx(numpy_model.nll(text, int8_cache=True), abs=5e-3)
    assert line["nll_float_cache"] == pytest.approx(
        numpy_model.nll(text, int8_cache=False), abs=5e-3
    )


def test_eval_the_int8_cache_costs_next_to_nothing(capsys, tmp_path):
    sources = [pathlib.Path(inspect.getsourcefile(m)).read_bytes() for m in (argparse, inspect)]
    paths = []
    for i, source in enumerate(sources):
        paths.append(tmp_path / f"{i}.py")
        paths[-1].write_bytes(source[:15_361])  # 60 windows, and one of 1 byte
    assert main(["eval", *map(str, paths)]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["targets"] == 2 * 60 * 255
    assert abs(line["nll_int8_cache"] - line["nll_float_cache"]) <= 0.0005
    assert 0.6 < line["nll_float_cache"] < 1.6  # the model has seen these two; guessing is 5.5


BAD = [
    (["eval", "{tmp}/none.py"], "cannot read '.*none.py': No such file or directory"),
    (["eval", "{tmp}"], "cannot read '.*': Is a directory"),
    (["eval", "{tmp}/empty"], "must have at least 2 bytes, got fewer"),
    (["eval", "{tmp}/one"], "must have at least 2 bytes, got fewer"),
    (["eval", "{tmp}/one", "--scales", "{tmp}/none.npz"], "cannot read '.*none.npz': No such file"),
    (["eval", "{tmp}/one", "--scales", "{tmp}/one"], "`scales` must be an .npz file, and '.*'"),
    (["demo", "--scales", "{tmp}/empty.npz"], "`scales` must hold 'layers.0.scale_k'"),
    (["demo", "--tokens", "0"], "`--tokens` must be at least 1, got 0"),
    (["demo", "--tokens", "250"], r"together must have at most 256 bytes, .*, got 27 \+ 250"),
    (["demo", "--prompt", "x" * 300], r"at most 256 bytes, the model's context, got 300 \+ 200"),
    (["demo", "--prompt", ""], "`--prompt` must have at least 1 byte"),
    (
        ["demo", "--temperature", "-0.1"],
        "must be 0 or more and finite in float32, got -0.1",
    ),
    (
        ["demo", "--temperature", "nan"],
        "`--temperature` must be 0 or more and finite .*, got nan",
    ),
    (["demo", "--seed", "-1"], r"`--seed` must be in \[0, 2\*\*32\), got -1"),
]


@pytest.mark.parametrize(("command", "message"), BAD)
def test_bad_input_is_one_line_and_exit_status_2(command, message, capsys, tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "one").write_bytes(b"x")
    np.savez(tmp_path / "empty.npz")
    assert main([word.format(tmp=tmp_path) for word in command]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err), captured.err
