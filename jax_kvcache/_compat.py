"""The few things from JAX's private modules, each with its reason; test_compat.py guards them.

Written against JAX 0.10.2 and 0.12.
"""

from jax._src import dispatch
from jax.extend.core import Primitive


def requires_devices_during_lowering(primitive: Primitive) -> None:
    """Lets the lowering of `primitive` use custom_partitioning, which asks for the devices.

    JAX leaves them out of the lowering context unless a primitive of the program is known to need
    them, and looks no further than the program's own primitives.
    """
    dispatch.prim_requires_devices_during_lowering.add(primitive)


def num_automatic_devices(ctx) -> int:
    """How many devices XLA's partitioner spreads the program that is being lowered over."""
    return getattr(ctx.module_context.axis_context, "num_devices", 1)


def is_export(ctx) -> bool:
    """Whether the program is being lowered by jax.export."""
    return ctx.module_context.lowering_parameters.for_export
