"""Runs notebooks from their text form and writes them with their outputs, without metadata.

python notebooks/execute.py [NAME.py ...]  (all of them by default); needs the `notebooks` extra.
"""

import pathlib
import sys
import time

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = pathlib.Path(__file__).resolve().parent


def execute(text: pathlib.Path, timeout: int = 600) -> nbformat.NotebookNode:
    """The notebook of one text form, run in a fresh kernel."""
    notebook = jupytext.read(text, fmt="py:percent")
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": HERE}}
    )
    client.execute()
    return notebook


def strip(notebook: nbformat.NotebookNode) -> None:
    """Keeps sources and outputs: no times, no kernel, ids by position."""
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    for number, cell in enumerate(notebook.cells):
        cell.metadata, cell.id = nbformat.NotebookNode(), f"cell-{number}"
        for output in cell.get("outputs", ()):
            output.pop("metadata", None)
            if output.output_type in ("display_data", "execute_result"):
                output["metadata"] = nbformat.NotebookNode()
                if "image/png" in output.data:
                    output.data = nbformat.from_dict({"image/png": output.data["image/png"]})


def main() -> None:
    """Executes the named text forms, or all."""
    names = sys.argv[1:] or sorted(p for p in HERE.glob("*.py") if p.with_suffix(".ipynb").exists())
    for name in names:
        text = HERE / pathlib.Path(name).name
        start = time.perf_counter()
        notebook = execute(text)
        strip(notebook)
        nbformat.write(notebook, text.with_suffix(".ipynb"))
        size = text.with_suffix(".ipynb").stat().st_size
        print(f"{text.stem}: {time.perf_counter() - start:.0f} s, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
