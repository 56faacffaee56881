"""What both KV caches share: their fields, their checks, and the write into one layer of many."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_kvcache._checks import Call, check_row_count
from jax_kvcache._op import canonical_operands, dequant_rope_quant_kvcache
from jax_kvcache._primitive import dequant_rope_quant_kvcache_canonical


@dataclasses.dataclass(frozen=True)
class CacheBase:
    """What both caches hold; see `KVCache` and `PagedKVCache` for the shapes."""

    k_cache: jax.Array
    v_cache: jax.Array
    scale_k: jax.Array
    scale_v: jax.Array
    offset_k: jax.Array | None
    offset_v: jax.Array | None
    layers: int | None = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, scales and offsets together."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> tuple[jax.Array, jax.Array]:
        """Turns the codes back into numbers: `(code - offset) * scale`, computed in float32.

        This makes two arrays of the caches' shape, for tests and analysis; `decode_attention`
        reads the codes themselves.

        Args:
          dtype: a floating-point dtype.

        Returns:
          k and v, shaped like `k_cache`, in `dtype`.

        Raises:
          TypeError: `dtype` is not a floating-point dtype.
        """
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"`dtype` must be a floating-point dtype, got {jnp.dtype(dtype).name}.")

        def restore(codes: jax.Array, scale: jax.Array, offset: jax.Array | None) -> jax.Array:
            # [*layers, Nkv, D] -> [*layers, 1, 1, Nkv, D]
            values = codes.astype(jnp.float32)
            if offset is not None:
                values = values - jnp.expand_dims(offset, (-4, -3))
            return (values * jnp.expand_dims(scale, (-4, -3))).astype(dtype)

        return (
            restore(self.k_cache, self.scale_k, self.offset_k),
            restore(self.v_cache, self.scale_v, self.offset_v),
        )

    def write(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        indices: jax.Array,
        cache_mode: str,
        layer: ArrayLike | None,
        params: dict[str, Any],
    ) -> tuple[jax.Array, Self]:
        """Runs the operator on the cache, or on one layer of it."""
        check_layer(self, layer)
        offsets = {"offset_k": self.offset_k, "offset_v": self.offset_v}
        if layer is None:
            out = dequant_rope_quant_kvcache(
                x, cos, sin, self.k_cache, self.v_cache, indices, self.scale_k, self.scale_v,
                **offsets, **params, cache_mode=cache_mode,
            )  # fmt: skip
            q, k_cache, v_cache = out.q, out.k_cache, out.v_cache
        else:
            q, k_cache, v_cache = self._write_layer(
                x, cos, sin, indices, cache_mode, layer, **params
            )
        return q, dataclasses.replace(self, k_cache=k_cache, v_cache=v_cache)

    def _write_layer(
        self, x, cos, sin, indices, cache_mode, layer, *,
        weight_scale=None, activation_scale=None, bias=None, implementation=None,
    ):  # fmt: skip
        """The operator on one layer: the layer is one more row dimension, folded into the slot."""
        layer = jnp.asarray(layer)
        layer = jnp.where((layer >= 0) & (layer < self.layers), layer, -1).astype(jnp.int32)
        offset_k, offset_v = (
            None if offset is None else offset[layer] for offset in (self.offset_k, self.offset_v)
        )
        scale_k, scale_v = self.scale_k[layer], self.scale_v[layer]
        k_layer, v_layer = (
            jax.ShapeDtypeStruct(cache.shape[1:], cache.dtype)
            for cache in (self.k_cache, self.v_cache)
        )
        operands, sizes = canonical_operands(
            Call(
                x, cos, sin, k_layer, v_layer, indices, scale_k, scale_v,
                offset_k=offset_k, offset_v=offset_v, weight_scale=weight_scale,
                activation_scale=activation_scale, bias=bias, cache_mode=cache_mode,
                implementation=implementation,
            ),
            one_slot_space=True,
        )  # fmt: skip
        # A slot that is not the layer's own must not become another layer's.
        rows = jnp.asarray(sizes.C1 * sizes.C2, jnp.int32)
        own = (operands.slots >= 0) & (operands.slots < rows) & (layer >= 0)
        slots = jnp.where(own, layer * rows + operands.slots, -1)
        operands = operands._replace(k_cache=self.k_cache, v_cache=self.v_cache, slots=slots)
        q, _, _, k_cache, v_cache = dequant_rope_quant_kvcache_canonical(
            operands,
            kv_output=False,
            indices_mode="drop",
            implementation=implementation,
        )
        return q.reshape(*sizes.tokens, sizes.Nq, sizes.D), k_cache, v_cache


def check_layer(cache: CacheBase, layer: ArrayLike | None) -> None:
    """Raises unless `layer` is given exactly when the cache has layers."""
    if cache.layers is None and layer is not None:
        raise TypeError("`layer` must be None for a cache without layers.")
    if cache.layers is not None and layer is None:
        raise TypeError(f"`layer` is required for a cache with {cache.layers} layers, got None.")
    if layer is None or cache.layers is None:
        return
    if jnp.shape(layer) or not jnp.issubdtype(jnp.result_type(layer), jnp.integer):
        raise TypeError(
            "`layer` must be an integer scalar, "
            f"got {jnp.result_type(layer)} of shape {list(jnp.shape(layer))}."
        )
    if isinstance(layer, int) and not 0 <= layer < cache.layers:
        raise ValueError(f"`layer` must be in [0, {cache.layers}), got {layer}.")


def check_positions(positions: ArrayLike, letters: str, x: jax.Array) -> jax.Array:
    """Returns `positions` as an array; raises unless they fit a 3-D `x`."""
    if jnp.ndim(x) != 3:
        raise TypeError(f"`x` must have shape [B, S, H], got {list(jnp.shape(x))}.")
    rank = letters.count(",") + 1
    return check_int32("positions", positions, letters, jnp.shape(x)[:rank])


def check_int32(
    name: str, value: ArrayLike, letters: str, dims: tuple[int | None, ...] | None = None
) -> jax.Array:
    """Returns `value` as an array; raises unless it is int32 with the dimensions that are given."""
    value = jnp.asarray(value)
    if value.dtype != jnp.int32 or value.ndim != letters.count(",") + 1:
        raise TypeError(
            f"`{name}` must be int32 of shape [{letters}], "
            f"got {value.dtype} of shape {list(value.shape)}."
        )
    dims = dims or value.shape
    if any(want not in (None, got) for want, got in zip(dims, value.shape, strict=True)):
        numbers = ", ".join("any" if d is None else str(d) for d in dims)
        raise ValueError(
            f"`{name}` must have shape [{letters}] = [{numbers}], got {list(value.shape)}."
        )
    return value


def empty_fields(
    sizes: dict[str, int],
    num_kv_heads: int,
    head_dim: int,
    layers: int | None,
    scale_k: ArrayLike,
    scale_v: ArrayLike,
    offset_k: ArrayLike | None,
    offset_v: ArrayLike | None,
) -> dict[str, Any]:
    """Checks what `create` was given and returns the fields of an empty cache."""
    sizes = sizes | {"num_kv_heads": num_kv_heads, "head_dim": head_dim}
    if layers is not None:
        sizes = {"layers": layers} | sizes
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"`{name}` must be an int, got {type(size).__name__}.")
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, got {size}.")
    if head_dim % 2:
        raise ValueError(f"`head_dim` must be even, got {head_dim}.")
    shape = tuple(sizes.values())
    check_row_count("k_cache", ", ".join(list(sizes)[:-2]), shape[:-2])
    if (offset_k is None) != (offset_v is None):
        given, missing = ("k", "v") if offset_v is None else ("v", "k")
        raise ValueError(
            f"`offset_k` and `offset_v` must be given together, got `offset_{given}` without "
            f"`offset_{missing}`. Pass zeros for the one without an offset."
        )

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
        return value.astype(jnp.float32)

    return {
        "k_cache": jnp.zeros(shape, jnp.int8),
        "v_cache": jnp.zeros(shape, jnp.int8),
        "scale_k": per_layer("scale_k", scale_k),
        "scale_v": per_layer("scale_v", scale_v),
        "offset_k": None if offset_k is None else per_layer("offset_k", offset_k),
        "offset_v": None if offset_v is None else per_layer("offset_v", offset_v),
        "layers": layers,
    }
