"""Runs every artifact of a folder in this fresh process and saves the results beside it."""

import pathlib
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import AxisType

import jax_kvcache  # noqa: F401  an artifact's custom calls find their targets here

folder = pathlib.Path(sys.argv[1])
jax.config.update("jax_num_cpu_devices", 4)


def run(function, path, place=lambda arguments: arguments):
    with path.open("rb") as f:
        caches, others = place(jax.tree.map(jnp.asarray, pickle.load(f)))
    results = function(caches, others)
    assert all(cache.is_deleted() for cache in caches), "the caches were copied"
    np.savez(path.with_suffix(".npz"), *map(np.asarray, results))


def placer(name, artifact):
    """Puts the arguments where an artifact for several devices wants them."""
    if artifact.nr_devices == 1:
        return lambda arguments: arguments
    kind = AxisType.Explicit if name == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((artifact.nr_devices,), ("dp",), (kind,))
    shardings = artifact.in_shardings_jax(mesh)

    def place(arguments):
        leaves, tree = jax.tree.flatten(arguments)
        return tree.unflatten(map(jax.device_put, leaves, shardings))

    return place


for path in sorted(folder.glob("*.export")):
    artifact = jax.export.deserialize(path.read_bytes())
    function = jax.jit(artifact.call, donate_argnums=0)
    for call in sorted(folder.glob(f"{path.stem}.*.arguments")):
        run(function, call, placer(path.stem, artifact))

for path in sorted(folder.glob("*.executable")):
    with path.open("rb") as f:
        function = serialize_executable.deserialize_and_load(
            *pickle.load(f), execution_devices=jax.devices()[:1]
        )
    for call in sorted(folder.glob(f"{path.stem}.*.arguments")):
        run(function, call)
