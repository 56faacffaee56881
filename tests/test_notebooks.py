"""The notebooks: they run from a fresh kernel, agree with their text form, and stay small."""

import base64
import pathlib
import runpy

import pytest

jupytext = pytest.importorskip("jupytext", reason="the `notebooks` extra is not installed")
nbformat = pytest.importorskip("nbformat", reason="the `notebooks` extra is not installed")
pytest.importorskip("nbclient", reason="the `notebooks` extra is not installed")
pytest.importorskip("ipykernel", reason="the `notebooks` extra is not installed")

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
NAMES = ("quickstart", "numerics", "lowering", "exactness", "sharding", "serving")
CELL_TIMEOUT = 300  # seconds; a notebook takes less than 90 on two idle cores


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def test_these_are_all_notebooks():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # zmq's event loop
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client")
def test_runs_from_a_fresh_kernel(name):
    execute = runpy.run_path(str(FOLDER / "execute.py"))["execute"]
    execute(FOLDER / f"{name}.py", timeout=CELL_TIMEOUT)  # raises where a cell does


@pytest.mark.parametrize("name", NAMES)
def test_text_form_is_the_same(name):
    text = jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")
    cells = [[(c.cell_type, c.source) for c in book.cells] for book in (text, read(name))]
    assert cells[0] == cells[1], f"run: python notebooks/execute.py {name}.py"


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_committed_and_small(name):
    path = FOLDER / f"{name}.ipynb"
    assert path.stat().st_size < 500_000
    outputs = [o for cell in read(name).cells for o in cell.get("outputs", ())]
    pictures = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", ())]
    assert pictures
    assert all(len(base64.b64decode(picture)) < 100_000 for picture in pictures)
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)


@pytest.mark.parametrize("name", NAMES)
def test_metadata_is_stripped(name):
    notebook = read(name)
    assert set(notebook.metadata) == {"kernelspec"}
    assert all(not cell.metadata for cell in notebook.cells)
