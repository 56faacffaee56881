"""A small call of every public function that runs on the host, beside those in `public_calls`."""

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from support import checkpoint_folder

from jax_kvcache import BlockAllocator, checkpoints, disabled_export_checks, permute_for_rope

L, Nkv, D = 2, 2, 4
FLOAT = checkpoint_folder.FOLDERS / "llama3_float"


def _allocator() -> dict[str, Any]:
    allocator = BlockAllocator(8, 4)
    first = allocator.allocate(6)
    second = allocator.fork(first)
    copies = [allocator.append(sequence) for sequence in (first, second)]
    allocator.truncate(second, 3)
    return {"copies": np.array(copies), "table": allocator.block_table([first, second, None], 3)}


def _saved(model: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save(model, pathlib.Path(folder) / "saved")
        return checkpoints.load(pathlib.Path(folder) / "saved", progress=False)


def _scales(format: Any) -> dict[str, np.ndarray]:
    scale = np.random.default_rng(0).uniform(0.1, 1, (L, Nkv, D)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "scales"
        scales = {"scale_k": scale, "scale_v": 2 * scale}
        checkpoints.write_kv_scales(path, scales, format, reduce="max")
        return checkpoints.read_kv_scales(path, num_kv_heads=Nkv)


def calls() -> dict[str, Callable[[], Any]]:
    """What each call does."""
    return {
        "BlockAllocator": _allocator,
        "disabled_export_checks": lambda: [str(check) for check in disabled_export_checks()],
        "permute_for_rope": lambda: permute_for_rope(np.arange(2 * D), D, interleaved=True).arrays,
        "load": lambda: checkpoints.load(FLOAT, progress=False),
        "load, w8a8": lambda: checkpoints.load(FLOAT, "w8a8", progress=False),
        "load_demo": lambda: checkpoints.load_demo(),
        "save": lambda: _saved(checkpoints.load(FLOAT, "w8a8", progress=False)),
        "load_tokenizer": lambda: checkpoints.load_tokenizer(checkpoints.demo_folder(), 256).encode(
            b"text"
        ),
        **{
            f"write_kv_scales, {name}": lambda name=name: _scales(name)
            for name in ("npz", "onnxruntime", "ascend_v1", "compressed_tensors")
        },
    }
