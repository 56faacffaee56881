"""`python -m jax_kvcache explain` and `--version`."""

import pytest

import jax_kvcache
from jax_kvcache.__main__ import main

LLAMA = ["--heads", "32", "--kv-heads", "8", "--head-dim", "128"]


def run(capsys, *options):
    assert main(["explain", *options]) == 0
    return capsys.readouterr().out.splitlines()


def test_both_operators_on_this_machine(capsys):
    write, read = run(capsys, *LLAMA, "--dtype", "bfloat16")
    assert write.startswith("dequant_rope_quant_kvcache  cpu: ffi: the native target")
    assert read.startswith("decode_attention            cpu: ")


def test_platforms(capsys):
    lines = run(capsys, *LLAMA, "--platform", "tpu", "ascend", "--length", "100000000")
    assert [line.split()[1] for line in lines] == ["tpu:", "tpu:", "ascend:", "ascend:"]
    assert "xla: there is no native target for platform 'tpu'" in lines[0]
    assert "got H = 6144; tensor parallelism over 2 devices fits (H = 3072)" in lines[2]


def test_a_name_that_is_no_platform(capsys):
    lines = run(capsys, *LLAMA, "--platform", "")
    assert "xla: there is no native target for platform ''" in lines[0]


def test_the_shape_is_the_models(capsys):
    (write, _) = run(
        capsys, "--heads", "4", "--kv-heads", "2", "--head-dim", "48", "--float-x",
        "--dtype", "float32", "--batch", "3", "--steps", "5", "--platform", "ascend",
    )  # fmt: skip
    assert "takes float16 and bfloat16 tables, got float32" in write


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heads", "0"], "`--heads` must be at least 1, got 0."),
        (["--kv-heads", "-1"], "`--kv-heads` must be at least 1, got -1."),
        (["--kv-heads", "5"], "`--heads` must be a multiple of `--kv-heads` = 5, got 32."),
        (["--head-dim", "127"], "`--head-dim` must be even, got 127."),
        (["--head-dim", "1000000000000"], "`--head-dim` must be at most 2147483647, got 1000000"),
        (["--batch", "0"], "`--batch` must be at least 1"),
        (["--batch", "65536", "--length", "65536"], "`--batch` times `--length` must be at most"),
    ],
)
def test_bad_shapes_are_named_in_the_commands_words(capsys, options, message):
    assert main(["explain", *LLAMA, *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"jax_kvcache {jax_kvcache.__version__}\n"
