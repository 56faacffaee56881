"""What `jax.export` has to be told: the package's pytrees, and which custom calls are ours."""

import ast
import dataclasses
from typing import TypeVar

import jax.export
import numpy as np

from jax_kvcache import backends

_Class = TypeVar("_Class", bound=type)


def disabled_export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What `jax.export.export` takes as `disabled_checks` for a function that uses this package.

    JAX exports a custom call that it does not know only when told to, since it cannot promise that
    the call keeps its meaning. Ours do: their operands and results are part of the package's
    version, which must be the same where the exported function runs.

        exported = jax.export.export(
            jax.jit(step), disabled_checks=jax_kvcache.disabled_export_checks()
        )(cache, x, positions)
        data = exported.serialize()

    and where it runs, after `import jax_kvcache` (and `jax_kvcache.numerics`, for its observers):

        cache = jax.export.deserialize(data).call(cache, x, positions)

    Returns:
      One check for each native target.
    """
    names = sorted({name for backend in backends.BACKENDS for name in backend.targets})
    return [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]


def register_dataclass_serialization(cls: _Class) -> _Class:
    """Lets exported functions take and return a dataclass that is registered as a pytree.

    Its static fields hold numbers, None and tuples of them.
    """

    def deserialize(data: bytes) -> object:
        return ast.literal_eval(data.decode())

    def serialize(static: object) -> bytes:
        # NumPy's numbers, which compare equal to Python's, have a repr that is no literal.
        plain = jax.tree.map(lambda n: n.item() if isinstance(n, np.generic) else n, static)
        return repr(plain).encode()

    assert dataclasses.is_dataclass(cls)
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"jax_kvcache.{cls.__name__}",
        serialize_auxdata=serialize,
        deserialize_auxdata=deserialize,
    )
    return cls


def register_namedtuple_serialization(cls: _Class) -> _Class:
    """Lets exported functions take and return a NamedTuple."""
    jax.export.register_namedtuple_serialization(cls, serialized_name=f"jax_kvcache.{cls.__name__}")
    return cls
