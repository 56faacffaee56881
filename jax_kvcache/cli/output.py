"""The files and figures that commands write: refused before the work starts, written after it."""

import contextlib
import errno
import io
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from jax_kvcache.cli import CommandError


@contextlib.contextmanager
def _errors_name(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(f"cannot write '{path}': {error.strerror}.") from error


@contextlib.contextmanager
def output_file(path: str) -> Iterator[io.BytesIO]:
    """A buffer that becomes the file `path` at the end of the block, whole or not at all.

    The block does not run if the file cannot be written; if the block fails, `path` stays as it
    was. Anything but a regular file, such as a pipe, is written to directly.

    Raises:
      CommandError: the file cannot be written.
    """
    target, buffer = os.path.realpath(path), io.BytesIO()
    is_special = os.path.exists(target) and not os.path.isfile(target)
    part = target if is_special else f"{target}.{os.getpid()}.part"
    with _errors_name(path):
        if os.path.isfile(target) or not os.path.basename(path):
            with open(path, "ab"):  # no such name, or a file that is write-protected
                pass
        file = open(part, "wb")  # noqa: SIM115
    try:
        yield buffer
        with _errors_name(path):
            with file:
                file.write(buffer.getvalue())
            if not is_special:
                os.replace(part, target)
    finally:
        file.close()
        if not is_special:
            pathlib.Path(part).unlink(missing_ok=True)


@contextlib.contextmanager
def output_folder(path: str) -> Iterator[str]:
    """The path, of an empty folder from now on, which goes again if it was made and stays empty.

    Raises:
      CommandError: it cannot be made, or is there and not empty.
    """
    folder = pathlib.Path(path)
    is_new = not folder.exists()
    with _errors_name(path):
        if not is_new and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        with tempfile.TemporaryFile(dir=folder):  # it can be written to
            pass
    try:
        yield path
    finally:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


@contextlib.contextmanager
def figure_file(path: str | None) -> Iterator[Any]:
    """matplotlib.pyplot, whose current figure becomes the file `path` at the end of the block.

    None, and no figure, if `path` is None.

    Raises:
      CommandError: there is no matplotlib, or the file cannot be written.
    """
    if path is None:
        yield None
        return
    try:
        import matplotlib
    except ImportError as error:
        raise CommandError("`--plot` needs matplotlib: pip install 'jax-kvcache[plot]'.") from error
    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    kind = pathlib.Path(path).suffix[1:].lower() or "png"
    if kind not in kinds:
        raise CommandError(f"cannot write '{path}': a figure may end in {', '.join(kinds)}.")
    with output_file(path) as file:
        yield pyplot
        pyplot.savefig(file, format=kind, dpi=100)
        pyplot.close()
