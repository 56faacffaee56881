"""What both KV caches share: their fields, and the write into one layer of many."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_kvcache._cache_checks import check_caches, layer_index
from jax_kvcache._checks import Call
from jax_kvcache._op import canonical_operands, dequant_rope_quant_kvcache
from jax_kvcache._primitive import dequant_rope_quant_kvcache_canonical


@dataclasses.dataclass(frozen=True, eq=False)
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
        check_caches(self)
        at = layer_index(self.layers, layer)
        offsets = {"offset_k": self.offset_k, "offset_v": self.offset_v}
        if at is None:
            out = dequant_rope_quant_kvcache(
                x, cos, sin, self.k_cache, self.v_cache, indices, self.scale_k, self.scale_v,
                **offsets, **params, cache_mode=cache_mode,
            )  # fmt: skip
            q, k_cache, v_cache = out.q, out.k_cache, out.v_cache
        else:
            q, k_cache, v_cache = self._write_layer(x, cos, sin, indices, cache_mode, at, **params)
        return q, dataclasses.replace(self, k_cache=k_cache, v_cache=v_cache)

    def _write_layer(
        self, x, cos, sin, indices, cache_mode, at, *,
        weight_scale=None, activation_scale=None, bias=None, implementation=None,
    ):  # fmt: skip
        """The operator on one layer: the layer is one more row dimension, folded into the slot."""
        layer, exists = at
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
        own = (operands.slots >= 0) & (operands.slots < rows) & exists
        slots = jnp.where(own, layer * rows + operands.slots, -1)
        operands = operands._replace(k_cache=self.k_cache, v_cache=self.v_cache, slots=slots)
        q, _, _, k_cache, v_cache = dequant_rope_quant_kvcache_canonical(
            operands,
            kv_output=False,
            indices_mode="drop",
            implementation=implementation,
        )
        return q.reshape(*sizes.tokens, sizes.Nq, sizes.D), k_cache, v_cache
