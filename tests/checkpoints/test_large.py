"""Loading takes little more memory than the model; tests/programs has one of 1.5 B parameters."""

import json

from support import process


def test_loading_in_little_memory(tmp_path):
    program = process.PROGRAMS / "load_large.py"
    report = json.loads(process.run(program, tmp_path / "folder", "60M"))
    assert report["parameters"] > 50e6
    assert report["model_bytes"] < 2.1 * report["parameters"], "bfloat16 stays bfloat16"
    # The bar of 1.3 is for 1.5 B parameters, for which the program is run by hand. What JAX itself
    # takes once, to compile and in its allocator, shows at this size.
    grown = report["anonymous_peak"] - report["anonymous_before"]
    assert grown < 1.3 * report["model_bytes"] + (64 << 20)
    assert all(0 <= token < 32000 for token in report["tokens"])
