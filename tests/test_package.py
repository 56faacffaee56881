"""What `import jax_kvcache` gives: its names, its help, its annotations."""

import pydoc
import subprocess
import sys
from pathlib import Path

import pytest
from support import process

import jax_kvcache

ROOT = Path(__file__).parents[1]
PROGRAM = Path(__file__).parent / "programs" / "typed_user.py"


def test_a_star_import_gives_the_public_names_alone():
    names = {}
    exec("from jax_kvcache import *", names)
    del names["__builtins__"]
    assert set(names) == set(jax_kvcache.__all__)
    defined = {n for n, value in vars(jax_kvcache).items() if not isinstance(value, type(sys))}
    dunder = {n for n in defined if n.startswith("__") and n != "__version__"}
    assert defined - dunder == set(jax_kvcache.__all__)


def test_the_docstring_maps_every_function_and_class():
    types = {"BlockCopy", "DequantRopeQuantKvcacheResult", "Explanation", "OutOfBlocksError",
             "RaggedBatch", "RopePermutation"}  # fmt: skip
    for name in set(jax_kvcache.__all__) - types - {"__version__"}:
        assert f"`{name}`" in jax_kvcache.__doc__, name


def test_help_lists_the_functions():
    text = pydoc.render_doc(jax_kvcache, renderer=pydoc.plaintext)
    for name in ("decode_attention", "rope_tables", "explain"):
        assert f"\n    {name}(" in text


def test_a_users_program_is_strictly_typed():
    """Generic over both caches, and with numerics."""
    pytest.importorskip("mypy", reason="the `dev` extra is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent",
         "--config-file=", f"--cache-dir={ROOT / '.mypy_cache' / 'user'}", str(PROGRAM)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_users_program_runs():
    assert "PagedKVCache(" in process.run(PROGRAM)
