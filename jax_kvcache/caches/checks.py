"""The checks of what the KV caches are given, and an empty cache's fields."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_kvcache.ops.checks import (
    FLOAT32,
    INT8,
    are_scales,
    check_array,
    check_int,
    check_int32,
    check_offsets_together,
    check_positive,
    check_row_count,
    check_shape,
)
from jax_kvcache.ops.dequant_rope_quant_kvcache.checks import Layer


def check_caches(cache: Any) -> None:
    """Raises unless the fields of a KVCache or PagedKVCache, however made, fit each other."""
    lead = [] if cache.layers is None else ["L"]
    letters = [*lead, "C1", "C2", "Nkv", "D"]
    for name in ("k_cache", "v_cache"):
        check_array(name, getattr(cache, name), INT8, (len(letters),))
    shape = cache.k_cache.shape
    check_positive("k_cache", cache.k_cache, letters)
    check_shape("v_cache", cache.v_cache, (", ".join(letters), shape))
    if cache.layers is not None and shape[0] != cache.layers:
        raise ValueError(f"`k_cache` must have `layers` = {cache.layers} layers, got {shape[0]}.")
    check_offsets_together(cache.offset_k, cache.offset_v)
    letters, dims = [*lead, "Nkv", "D"], (*shape[:-4], *shape[-2:])
    offsets = () if cache.offset_k is None else ("offset_k", "offset_v")
    for name in ("scale_k", "scale_v", *offsets):
        check_array(name, getattr(cache, name), FLOAT32, (len(letters),))
        check_shape(name, getattr(cache, name), (", ".join(letters), dims))


def layer_index(layers: int | None, layer: ArrayLike | None) -> Layer | None:
    """Which layer to use, for a cache with layers.

    Args:
      layers: L, or None for a cache without layers.
      layer: an integer scalar; given exactly when the cache has layers.

    Returns:
      None without layers; else the nearest layer, and whether it is the one that was named.
    """
    if layers is None and layer is not None:
        raise TypeError("`layer` must be None for a cache without layers.")
    if layers is not None and layer is None:
        raise TypeError(f"`layer` is required for a cache with {layers} layers, got None.")
    if layers is None or layer is None:
        return None
    if not isinstance(layer, jax.Array):
        number = np.asarray(layer)
        if number.ndim or not np.issubdtype(number.dtype, np.integer):
            raise TypeError(f"`layer` must be an integer scalar, got {layer!r}.")
        if not 0 <= number.item() < layers:
            raise ValueError(f"`layer` must be in [0, {layers}), got {number}.")
        return Layer(jnp.int32(number.item()), True)
    if layer.ndim or not jnp.issubdtype(layer.dtype, jnp.integer):
        raise TypeError(
            f"`layer` must be an integer scalar, got {layer.dtype} of shape {list(layer.shape)}."
        )
    # Compared before it is narrowed, and widened before it is compared: nothing wraps.
    wide = layer.astype(jnp.int32) if layer.dtype.itemsize < 4 else layer
    nearest = jnp.clip(wide, 0, layers - 1)
    return Layer(nearest.astype(jnp.int32), nearest == wide)


def check_positions(positions: ArrayLike, letters: str, x: jax.Array) -> jax.Array:
    """Returns `positions` as an array; raises unless they fit a 3-D `x`."""
    if not hasattr(x, "shape"):
        raise TypeError(
            f"`x` must be an array or a tuple (q, k, v) of arrays, got {type(x).__name__}."
        )
    if len(x.shape) != 3:
        raise TypeError(f"`x` must have shape [B, S, H], got {list(x.shape)}.")
    rank = letters.count(",") + 1
    return check_int32("positions", positions, letters, x.shape[:rank])


def empty_fields(
    sizes: dict[str, int],
    num_kv_heads: int,
    head_dim: int,
    layers: int | None,
    num_q_heads: int | None,
    scale_k: ArrayLike,
    scale_v: ArrayLike,
    offset_k: ArrayLike | None,
    offset_v: ArrayLike | None,
) -> dict[str, Any]:
    """Checks what `create` was given and returns the fields of an empty cache."""
    sizes = sizes | {"num_kv_heads": num_kv_heads, "head_dim": head_dim}
    if layers is not None:
        sizes = {"layers": layers} | sizes
    if num_q_heads is not None:
        num_q_heads = check_int("num_q_heads", num_q_heads, 1)
    sizes = {name: check_int(name, size, 1) for name, size in sizes.items()}
    layers = sizes.get("layers")
    num_kv_heads, head_dim = sizes["num_kv_heads"], sizes["head_dim"]
    if head_dim % 2:
        raise ValueError(f"`head_dim` must be even, got {head_dim}.")
    shape = tuple(sizes.values())
    check_row_count("k_cache", ", ".join(list(sizes)[:-2]), shape[:-2])
    check_offsets_together(offset_k, offset_v)

    def per_layer(name: str, value: ArrayLike) -> jax.Array:
        # A copy: the cache will be donated, and the caller keeps what was passed in.
        value = jnp.array(value)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"`{name}` must be floating-point, got {value.dtype}.")
        heads = (num_kv_heads, head_dim)
        if layers is not None and value.shape == heads:
            value = jnp.broadcast_to(value[None], (layers, *heads))
        letters, dims = ("Nkv, D", heads) if layers is None else ("L, Nkv, D", (layers, *heads))
        if value.shape != dims:
            raise ValueError(
                f"`{name}` must have shape [{letters}] = {list(dims)}, got {list(value.shape)}."
            )
        value = value.astype(jnp.float32)
        _check_values(name, value)
        return value

    return {
        "k_cache": jnp.zeros(shape, jnp.int8),
        "v_cache": jnp.zeros(shape, jnp.int8),
        "scale_k": per_layer("scale_k", scale_k),
        "scale_v": per_layer("scale_v", scale_v),
        "offset_k": None if offset_k is None else per_layer("offset_k", offset_k),
        "offset_v": None if offset_v is None else per_layer("offset_v", offset_v),
        "layers": layers,
        "num_q_heads": num_q_heads,
    }


def _check_values(name: str, value: jax.Array) -> None:
    """Raises ValueError for numbers that no scale or offset can be, where they are known."""
    if isinstance(value, jax.core.Tracer) or not value.is_fully_addressable:
        return
    numbers = jax.device_get(value)
    if name.startswith("scale"):
        smallest = np.finfo(np.float32).tiny
        usable = are_scales(numbers)
        expected = f"finite and at least {smallest}, the smallest normal float32 number"
    else:
        usable, expected = np.isfinite(numbers), "finite"
    if not usable.all():
        where = np.unravel_index(np.argmin(usable), usable.shape)
        letters = "Nkv, D" if numbers.ndim == 2 else "L, Nkv, D"
        raise ValueError(
            f"`{name}` must be {expected}, got {numbers[where]} at [{letters}] = "
            f"{[int(i) for i in where]}, and {np.count_nonzero(~usable)} such numbers in all."
        )
