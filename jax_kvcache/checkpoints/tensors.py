"""The safetensors files of a folder: which tensor is where, read one at a time, none forgotten."""

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from jax_kvcache.checkpoints.errors import CheckpointError
from jax_kvcache.checkpoints.json_files import read_json

FLOATS = ("F32", "F16", "BF16")
_FP8 = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
# How the names of a cache's parameters end, in every format.
OF_A_CACHE = ("cache_scale", "cache_offset", ".k_scale", ".v_scale")
_NAMES_SHOWN = 5


class Tensor(NamedTuple):
    """Where a tensor is, and what its file says of it."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class TensorFiles:
    """The tensors of a folder, memory-mapped; a context that shows a progress bar.

    Attributes:
      tensors: every tensor of the files by name.
    """

    def __init__(self, folder: Path, stem: str, progress: bool):
        """Opens every file and reads its header; no data is read yet.

        Args:
          folder: the folder.
          stem: the files are `{stem}.safetensors`, or those that
            `{stem}.safetensors.index.json` names.
          progress: whether to show a bar.

        Raises:
          CheckpointError: a file is missing, damaged or outside the folder, or the index and the
            files disagree.
        """
        self._open: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if index.is_file() and single.is_file():
            raise CheckpointError(
                f"'{folder}' must hold either '{single.name}' or '{index.name}', and holds both."
            )
        if index.is_file():
            self._read_shards(folder, index)
        elif single.is_file():
            self._read_header(folder, single.name)
        else:
            raise CheckpointError(
                f"'{folder}' must hold '{single.name}', or shards and '{index.name}'; it holds "
                f"{_some(sorted(p.name for p in folder.iterdir()))}."
            )
        self.unused = set(self.tensors)
        self._bar = tqdm(
            total=len(self.tensors), desc="loading", unit="tensor", disable=not progress
        )

    def _read_shards(self, folder: Path, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"'{index}' must have an object \"weight_map\".")
        for name, file in weight_map.items():
            # A name with a separator could read any file of this machine.
            if (
                not isinstance(file, str)
                or not file.endswith(".safetensors")
                or {"/", "\\"} & set(file)
            ):
                raise CheckpointError(
                    f"`{name}` must be in a file of the folder itself, got {file!r} in '{index}'."
                )
        for file in sorted(set(weight_map.values())):
            if not os.path.isfile(folder / file):  # False for names that no file can have, too
                lacking = [name for name, where in weight_map.items() if where == file]
                raise CheckpointError(
                    f"the shard '{file}' is missing from '{folder}': '{index.name}' says that it "
                    f"holds {_some(lacking)}. Download it again."
                )
            self._read_header(folder, file)
        for name, file in weight_map.items():
            if name not in self.tensors or self.tensors[name].file != file:
                got = self.tensors[name].file if name in self.tensors else "no file"
                raise CheckpointError(
                    f"`{name}` must be in '{file}' by '{index}', got it in {got}."
                )
        if extra := [name for name in self.tensors if name not in weight_map]:
            raise CheckpointError(f"'{index}' does not name {_some(extra)} of its shards.")

    def _read_header(self, folder: Path, file: str) -> None:
        path = folder / file
        try:
            opened = safe_open(path, framework="np").__enter__()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read '{path}': {_reason(path, error)}.") from error
        self._open[file] = opened
        for name in opened.keys():  # noqa: SIM118 (not a dict)
            if name in self.tensors:
                raise CheckpointError(
                    f"`{name}` must be in one file, got it in '{self.tensors[name].file}' and "
                    f"'{file}'."
                )
            view = opened.get_slice(name)
            self.tensors[name] = Tensor(file, view.get_dtype(), tuple(view.get_shape()))

    def __enter__(self) -> Self:
        """Nothing more to do: the constructor has opened the files."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the files and the bar."""
        self._bar.close()
        for opened in self._open.values():
            opened.__exit__(kind, error, traceback)

    def __contains__(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self.tensors

    def take(
        self, name: str, shapes: Iterable[tuple[int, ...]], dtypes: tuple[str, ...] = FLOATS
    ) -> np.ndarray:
        """Reads one tensor.

        Args:
          name: its name.
          shapes: the shapes that it may have.
          dtypes: the types that it may have, as safetensors calls them.

        Raises:
          CheckpointError: there is no such tensor, or it is not as expected.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"`{name}` is missing: expected {_or(dtypes)} of shape "
                f"{_or(list(s) for s in shapes)}; the files hold {_some(_similar(name, self))}."
            )
        file, dtype, shape = self.tensors[name]
        if dtype in _FP8:
            reason = (
                "fp8 tensors do not turn into int8 codes. Load the float checkpoint that it was "
                'made from, with `quantize="w8a8"`.'
            )
            if name.endswith(OF_A_CACHE):
                reason = (
                    "no int8 scale can be recovered from an fp8 one. Drop the cache's scales and "
                    "make others with `python -m jax_kvcache calibrate`."
                )
            raise CheckpointError(
                f"`{name}` of '{file}' must be {_or(dtypes)}, got {dtype}: {reason}"
            )
        if dtype not in dtypes:
            raise CheckpointError(f"`{name}` of '{file}' must be {_or(dtypes)}, got {dtype}.")
        shapes = list(shapes)
        if shape not in shapes:
            raise CheckpointError(
                f"`{name}` of '{file}' must have shape {_or(list(s) for s in shapes)}, got "
                f"{list(shape)}."
            )
        self.unused.discard(name)
        self._bar.update()
        return self._open[file].get_tensor(name)

    def check_all_used(self) -> None:
        """Raises CheckpointError for tensors that nothing has taken."""
        if self.unused:
            described = [f"`{n}` ({self.tensors[n].dtype})" for n in sorted(self.unused)]
            hint = ""
            if any(name.endswith(OF_A_CACHE) for name in self.unused):
                hint = (
                    " Scales of a cache need a description that says that they are of int8; those "
                    "of fp8 cannot be used: drop them and make scales with `python -m jax_kvcache "
                    "calibrate`."
                )
            raise CheckpointError(
                f"the model has no place for {len(self.unused)} tensors: {_some(described)}.{hint}"
            )


def _reason(path: Path, error: Exception) -> str:
    """What is wrong with a file that safetensors refuses, with the numbers put in."""
    size = path.stat().st_size
    if size < 8:
        return f"a safetensors file has at least 8 bytes, got {size}"
    with path.open("rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
    if header > size - 8:
        return (
            f"its header must fit into the file's {size} bytes, got a header of {header} bytes; "
            "the file is truncated or not a safetensors file"
        )
    return f"{error} ({size} bytes; truncated, or damaged, if its header says more)"


def _or(choices: Iterable[Any]) -> str:
    return " or ".join(map(str, choices))


def _some(names: list[str]) -> str:
    """A list's first names, and how many more."""
    shown = ", ".join(names[:_NAMES_SHOWN]) or "nothing"
    more = len(names) - _NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _similar(name: str, files: TensorFiles) -> list[str]:
    """The tensors beside the missing one, or else all."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:end]) + "."
        if found := sorted(n for n in files.tensors if n.startswith(prefix)):
            return found
    return sorted(files.tensors)
