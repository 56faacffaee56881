"""The golden calls: inputs, options and exact outputs of 25 calls, from tests/golden."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from support.results import NAMES as RESULTS

FOLDER = Path(__file__).parents[1] / "golden"
NAMES = sorted(path.stem for path in FOLDER.glob("*.npz"))
REFUSED = "g22_f16_single_offset_ignored"  # a lone offset: a ValueError here
ACCEPTED = [name for name in NAMES if name != REFUSED]


class GoldenCall(NamedTuple):
    inputs: dict[str, Any]
    options: dict[str, Any]
    expected: dict[str, Any]  # k and v are None without kv_output


def load(name) -> GoldenCall:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as z:
        meta = json.loads(str(z["meta"]))
        arrays = {
            key: z[key].view(ml_dtypes.bfloat16) if dtype == "bfloat16" else z[key]
            for key, dtype in meta["dtypes"].items()
        }
    expected = {name: arrays.pop(f"out_{name}", None) for name in RESULTS}
    options = {key: meta[key] for key in ("cache_mode", "kv_output", "quant_mode", "layout")}
    options["size_splits"] = tuple(meta["size_splits"])
    return GoldenCall(arrays, options, expected)
