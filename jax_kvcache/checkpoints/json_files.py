"""The JSON files of a folder, and numbers from them with errors that name key and file."""

import json
from pathlib import Path
from typing import Any

from jax_kvcache.checkpoints.errors import CheckpointError

MOST = 2**31 - 1  # positions, rows and widths are int32
# Far more than any model has, and few enough to make lists and arrays of them.
MOST_LAYERS, MOST_HEADS, MOST_HEAD_DIM = 10_000, 4096, 4096
_MOST_BYTES = 100 << 20  # an index of a million tensors has about as many


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      CheckpointError: the file is missing, too large, or holds no JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"'{path.parent}' must hold the file '{path.name}', and does not.")
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise CheckpointError(f"'{path}' must have at most {_MOST_BYTES} bytes, got {size}.")
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' must be JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"'{path}' must hold a JSON object, got {type(value).__name__}.")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError for a key that is there twice, with perhaps two values."""
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f'the key "{key}" must be there once, and is there twice')
        value[key] = item
    return value


class Values:
    """A JSON object's values, with their types checked; null counts as absent."""

    def __init__(self, values: dict[str, Any], where: str):
        """Takes the object, and how errors call it."""
        self.values, self.where = values, where

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The value of a type, or the default where it is absent."""
        value = self.values.get(key)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(k.__name__ for k in kinds)
            raise CheckpointError(f'"{key}" of {self.where} must be {expected}, got {value!r}.')
        return value

    def count(self, key: str, default: int | None = None, most: int = MOST) -> int:
        """An int in [1, most]; required unless there is a default."""
        value = self.get(key, int, default)
        if value is None:
            raise CheckpointError(f'{self.where} must have "{key}", and does not.')
        if value < 1:
            raise CheckpointError(f'"{key}" of {self.where} must be above 0, got {value}.')
        if value > most:
            raise CheckpointError(f'"{key}" of {self.where} must be at most {most}, got {value}.')
        return value
