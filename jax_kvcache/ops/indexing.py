"""Takes one of several parts of an array by a traced number."""

import jax
import jax.numpy as jnp


def take_one(parts: jax.Array, number: jax.Array, axis: int = 0) -> jax.Array:
    """Part `number` of an axis, which goes away; the nearest part where there is no such number.

    It is a gather and not a `dynamic_slice`. XLA:CPU merges an instruction named `dynamic_slice.N`,
    as JAX's are, with the partitioner's `dynamic-slice.N` when one fusion holds both, into a
    function that calls itself and never returns. XLA itself makes a dynamic slice of the gather,
    under a name that is no other's.
    """
    return jnp.take(parts, number, axis=axis, mode="clip")
