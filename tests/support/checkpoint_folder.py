"""The checkpoint folders of the tests, and copies of them with something changed."""

import json
import pathlib
import shutil

import ml_dtypes  # noqa: F401 (NumPy's bfloat16)
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

FOLDERS = pathlib.Path(__file__).parents[1] / "checkpoints" / "folders"
NAMES = sorted(path.name for path in FOLDERS.iterdir())
DESCRIPTION = "quant_model_description.json"


def expected(name):
    """`ids` [24], `logits` [24, 256], and `codes.k.I`, `codes.v.I` [24, Nkv, D] of AscendV1."""
    with np.load(FOLDERS / name / "expected.npz", allow_pickle=False) as data:
        return dict(data)


def read_tensors(folder):
    """Every tensor of a folder's files."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors


class Copy:
    """A folder in memory, to be changed and written: config, description, tensors."""

    def __init__(self, name):
        source = FOLDERS / name
        self.config = json.loads((source / "config.json").read_text())
        self.description = None
        if (source / DESCRIPTION).is_file():
            self.description = json.loads((source / DESCRIPTION).read_text())
        self.tensors = read_tensors(source)
        self.stem = "model" if self.description is None else "quant_model_weights"

    def put(self, name, value, kind=None):
        """Adds or replaces a tensor and its entry."""
        self.tensors[name] = np.ascontiguousarray(value)
        if self.description is not None:
            self.description[name] = kind

    def drop(self, name):
        """Removes a tensor and its entry."""
        del self.tensors[name]
        if self.description is not None:
            del self.description[name]

    def write(self, folder, shards=1):
        """Writes the folder, its tensors dealt out to `shards` files; returns its path."""
        folder = pathlib.Path(folder)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config))
        if self.description is not None:
            (folder / DESCRIPTION).write_text(json.dumps(self.description))
        if shards == 1:
            save_file(self.tensors, folder / f"{self.stem}.safetensors")
            return folder
        files = {n: i % shards for i, n in enumerate(self.tensors)}
        for shard in range(shards):
            part = {n: a for n, a in self.tensors.items() if files[n] == shard}
            save_file(part, folder / self.shard(shard, shards))
        index = {n: self.shard(i, shards) for n, i in files.items()}
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / f"{self.stem}.safetensors.index.json").write_text(text)
        return folder

    def shard(self, number, shards):
        """A shard's file name."""
        return f"{self.stem}-{number + 1:05}-of-{shards:05}.safetensors"
