"""Merging partial attention results by their log-sum-exp."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jax_kvcache.ops.checks import FLOAT32, FLOATS, check_array, check_shape


def merge_attention(
    outs: Sequence[jax.Array], lses: Sequence[jax.Array], sinks: jax.Array | None = None
) -> jax.Array:
    """Merges attention over separate sets of rows into attention over all of them.

    `sum_i(exp(lse_i) * out_i) / (sum_i(exp(lse_i)) + exp(sink))`, with the largest exponent taken
    out first, so that nothing overflows: a shared prefix and each sequence's own rows, the parts of
    a ring, the shards of a cache. The arithmetic is float32.

    Args:
      outs: of each part `out`, [..., Nq, D] float16, bfloat16 or float32, all of one shape. A part
        in which a query sees nothing is zeros there.
      lses: of each part `lse`, [..., Nq] float32, natural, -inf where nothing is seen, from
        `decode_attention(..., return_lse=True)` without sinks.
      sinks: [Nq] float32, one learned logit per query head that takes part in the softmax and has
        no value; it is added once, here, and not in the parts.

    Returns:
      [..., Nq, D] in the dtype of the parts; zeros where no part sees anything.

    Raises:
      TypeError: a wrong dtype or rank.
      ValueError: no parts, or shapes that do not fit each other.
    """
    outs, lses = list(outs), list(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"`outs` and `lses` must be as many, and at least one, got {len(outs)} and {len(lses)}."
        )
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        check_array(f"outs[{i}]", out, FLOATS, range(2, 9))
        check_array(f"lses[{i}]", lse, FLOAT32, (len(outs[0].shape) - 1,))
        check_shape(f"outs[{i}]", out, ("..., Nq, D", outs[0].shape))
        check_shape(f"lses[{i}]", lse, ("..., Nq", outs[0].shape[:-1]))
    if sinks is not None:
        check_array("sinks", sinks, FLOAT32, (1,))
        check_shape("sinks", sinks, ("Nq", outs[0].shape[-2:-1]))
    peak = jnp.stack(lses).max(axis=0)
    weights = [_weight(lse, peak) for lse in lses]
    parts = [o.astype(jnp.float32) * w[..., None] for o, w in zip(outs, weights, strict=True)]
    sums, total = (functools.reduce(jnp.add, terms) for terms in (parts, weights))
    return normalise(sums, total, peak, sinks).astype(outs[0].dtype)


def _weight(lse: jax.Array, peak: jax.Array) -> jax.Array:
    """exp(lse - peak); 0 where nothing is seen anywhere and both are -inf."""
    return jnp.where(peak == -jnp.inf, 0.0, jnp.exp(lse - peak))


def normalise(
    sums: jax.Array, total: jax.Array, peak: jax.Array, sinks: jax.Array | None
) -> jax.Array:
    """sums / (total + exp(sink - peak)); zeros where nothing is seen.

    Args:
      sums: [..., Nq, D] float32, of exp(lse - peak) * out.
      total: [..., Nq] float32, of exp(lse - peak).
      peak: [..., Nq] float32, the largest lse.
      sinks: [Nq] float32 (or with leading dimensions that broadcast), or None.
    """
    seen = peak != -jnp.inf
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks, peak.shape)
        largest = jnp.maximum(peak, sinks)
        kept = jnp.where(seen, jnp.exp(peak - largest), 0.0)
        total, sums = total * kept + jnp.exp(sinks - largest), sums * kept[..., None]
    return jnp.where(seen[..., None], sums / jnp.where(seen, total, 1.0)[..., None], 0.0)


def merge_over_axes(
    out: jax.Array, lse: jax.Array, axes: tuple[str, ...], sinks: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Inside `jax.shard_map`: merges the parts that the devices of some mesh axes have.

    Moves one maximum, [..., Nq], and one sum, [..., Nq, D + 1].

    Args:
      out: [..., Nq, D] float32, this device's part.
      lse: [..., Nq] float32, this device's part.
      axes: the mesh axes.
      sinks: as for `normalise`.

    Returns:
      out and lse over all parts, the same on every device; the sinks are not in lse.
    """
    peak = lax.pmax(lax.stop_gradient(lse), axes)  # it cancels, so it has no derivative
    weight = _weight(lse, peak)[..., None]
    both = lax.psum(jnp.concatenate([out * weight, weight], axis=-1), axes)
    sums, total = both[..., :-1], both[..., -1]
    seen = peak != -jnp.inf
    lse = jnp.where(seen, peak + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)
    return normalise(sums, total, peak, sinks), lse
