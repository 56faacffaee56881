"""Runs what JAX cannot type in explicit mode, gathers and scatters above all, in automatic mode."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from jax_kvcache.ops.slots import axes_named


def spec_of(array: Any) -> PartitionSpec:
    """The PartitionSpec of an array's type; of whole dimensions outside explicit mode."""
    return jax.typeof(array).sharding.spec


def automatically(function: Callable, out_specs: Any, *arguments: Any) -> Any:
    """`function(*arguments)`; on a mesh with explicit axes the partitioner chooses inside it.

    Args:
      function: of arrays and pytrees of arrays; it closes over no array.
      out_specs: the PartitionSpec of each result, which counts in explicit mode.
      *arguments: the arguments.
    """
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(arguments)]
    axes = {
        name
        for mesh in meshes
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }
    if not axes:
        return function(*arguments)
    names = tuple(sorted(axes))
    return jax.sharding.auto_axes(function, axes=names, out_sharding=out_specs)(*arguments)


def merge_leading(array: jax.Array, count: int) -> jax.Array:
    """The array with its first `count` dimensions, and the mesh axes that they have, as one."""
    spec = spec_of(array)
    axes = tuple(itertools.chain(*map(axes_named, spec[:count])))
    shape = (math.prod(array.shape[:count]), *array.shape[count:])
    out = PartitionSpec(axes or None, *spec[count:])
    return automatically(lambda a: a.reshape(shape), out, array)
