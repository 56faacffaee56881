"""Tokenizers of folders, and the commands with `--model FOLDER`."""

import json
import shutil

import numpy as np
import pytest
import tokenizers
from support import checkpoint_folder
from support.checkpoint_folder import Copy

from jax_kvcache import checkpoints
from jax_kvcache.__main__ import main
from jax_kvcache.checkpoints import CheckpointError, load_tokenizer

FOLDER = checkpoint_folder.FOLDERS / "qwen2_ascendv1_dynamic"


def words(vocab):
    """A tokenizer of `vocab` words, "w0" and so on."""
    model = tokenizers.models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer


@pytest.fixture
def folder(tmp_path):
    """A folder with a tokenizer of 256 words."""
    words(256).save(
        str(Copy("qwen2_ascendv1_dynamic").write(tmp_path / "folder") / "tokenizer.json")
    )
    return tmp_path / "folder"


def test_a_tokenizer_file(folder):
    tokenizer = load_tokenizer(folder, 256)
    assert tokenizer.encode(b"w3 w255\nw7").tolist() == [3, 255, 7]
    assert tokenizer.decode([3, 255]) == "w3 w255"
    with pytest.raises(ValueError, match="the text must be UTF-8"):
        tokenizer.encode(b"\xff")


def test_what_a_tokenizer_was_trained_with(folder):
    """A file may say how training cut and filled its texts; whole texts are read here."""
    tokenizer = words(256)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=6, pad_id=9, pad_token="w9", direction="left")
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder, 256).encode(b"w3 w255 w7 w1").tolist() == [3, 255, 7, 1]


def test_a_tokenizer_of_more_words_than_the_model_has(folder):
    tokenizer = load_tokenizer(folder, 100)
    assert tokenizer.encode(b"w3").tolist() == [3]
    with pytest.raises(ValueError, match=r"tokens in \[0, 100\), the model's vocabulary, got 255"):
        tokenizer.encode(b"w255")


def test_a_damaged_tokenizer_file(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"cannot read '.*tokenizer.json'"):
        load_tokenizer(folder, 256)


def test_without_the_package(folder, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'jax-kvcache\[tokenizers\]'"):
        load_tokenizer(folder, 256)
    assert main(["demo", "--model", str(folder)]) == 2
    assert "needs the package tokenizers" in capsys.readouterr().err


def test_bytes(tmp_path):
    tokenizer = load_tokenizer(checkpoints.demo_folder(), 256)
    assert tokenizer.encode("é\xff".encode()).tolist() == [0xC3, 0xA9, 0xC3, 0xBF]
    assert tokenizer.decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Utf8Bytes"}')
    with pytest.raises(CheckpointError, match="tokens are bytes, and the model has 300 tokens"):
        load_tokenizer(tmp_path, 300)


def test_numbers():
    tokenizer = load_tokenizer(FOLDER, 256)
    assert tokenizer.encode(b" 1 255\n7").tolist() == [1, 255, 7]
    assert tokenizer.decode([1, 255]) == "1 255 "
    for text in (b"1 256", b"1 x", b"-1"):
        with pytest.raises(ValueError, match=r"numbers of tokens in \[0, 256\) with spaces betw"):
            tokenizer.encode(text)


def demo(capsys, *options):
    status = main(["demo", "--tokens", "5", "--temperature", "0", *map(str, options)])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def test_demo_speaks_text_or_numbers(folder, capsys):
    text = demo(capsys, "--model", folder, "--prompt", "w5 w6")
    numbers = demo(capsys, "--model", FOLDER, "--prompt", "5 6")
    spoken = text.split("\n\n")[0].split()
    assert len(spoken) == 7
    assert [word.removeprefix("w") for word in spoken] == numbers.split("\n\n")[0].split()
    assert "greedy as with a float cache  5 of 5 tokens" in " ".join(text.split("\n\n")[1:])


def test_demo_stops_at_an_end_token(tmp_path, capsys):
    first = demo(capsys, "--model", FOLDER, "--prompt", "5 6").split()[2]
    copy = Copy("qwen2_ascendv1_dynamic")
    copy.config["eos_token_id"] = [int(first)]
    out = demo(capsys, "--model", copy.write(tmp_path / "folder"), "--prompt", "5 6")
    assert out.split("\n\n")[0].split() == ["5", "6", first]


def test_demo_of_a_float_folder(capsys):
    out = demo(capsys, "--model", checkpoint_folder.FOLDERS / "qwen3_float", "--prompt", "5 6")
    assert "in float32, since the folder has no scales; calibrate makes them" in out
    assert "greedy as" not in out


def test_calibrate_then_eval(tmp_path, capsys):
    """A float folder gets scales for its cache, and then has an int8 cache."""
    folder = str(checkpoint_folder.FOLDERS / "llama3_float")
    text, scales = tmp_path / "text", str(tmp_path / "scales.npz")
    ids = np.random.default_rng(0).integers(0, 256, 200)
    text.write_text(" ".join(map(str, ids)))
    options = ["--model", folder, "--window", "64", str(text)]
    assert main(["eval", *options]) == 0
    before = json.loads(capsys.readouterr().out)
    assert before["targets"] == 3 * 63 + 7
    assert before["nll_int8_cache"] is None
    assert main(["calibrate", *options, "--out", scales]) == 0
    capsys.readouterr()
    assert main(["eval", *options, "--scales", scales]) == 0
    after = json.loads(capsys.readouterr().out)
    assert after["nll_float_cache"] == before["nll_float_cache"]
    assert after["nll_int8_cache"] == pytest.approx(after["nll_float_cache"], rel=0.01)
    assert main(["eval", *options, "--quantize", "w8a8"]) == 0
    quantised = json.loads(capsys.readouterr().out)
    assert quantised["nll_float_cache"] != before["nll_float_cache"]
    assert quantised["nll_float_cache"] == pytest.approx(before["nll_float_cache"], rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "/nonexistent"], "`folder` must be a folder, got '/nonexistent', which is no"),
        (["--model", str(FOLDER), "--quantize", "w8a8"], "`quantize` must be None for a folder"),
        (["--model", str(FOLDER)], "so the text must be numbers of tokens in [0, 256)"),
        (["--window", "257"], "`--window` must be in [2, 256], the model's context, got 257"),
        (["--window", "1"], "`--window` must be in [2, 256], the model's context, got 1"),
    ],
)
def test_errors(options, message, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("some text")
    assert main(["eval", str(text), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_packages_own_folder_is_like_any_other(tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoints.demo_folder(), copy)
    prompt = ["--prompt", "import numpy as n"]
    assert (
        demo(capsys, "--model", copy, *prompt).split("\n\n")[0]
        == (demo(capsys, *prompt).split("\n\n")[0])
    )
