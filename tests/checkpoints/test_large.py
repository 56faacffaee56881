"""Loading takes little more memory than the model; tests/programs has one of 1.5 B parameters."""

import json

from support import process


def test_loading_in_little_memory(tmp_path):
    program = process.PROGRAMS / "load_large.py"
    report = json.loads(process.run(program, tmp_path / "folder", "60M"))
    assert report["parameters"] > 50e6
    assert report["model_bytes"] < 2.1 * report["parameters"], "bfloat16 stays bfloat16"
    assert report["growth"] < 1.3
    assert all(0 <= token < 32000 for token in report["tokens"])
