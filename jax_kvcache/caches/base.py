"""What both KV caches share: their fields, and one way into the operator for one layer or many."""

import dataclasses
from typing import Any, Literal, Self, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_kvcache.caches.checks import check_caches, layer_index
from jax_kvcache.ops.checks import check_axis_name
from jax_kvcache.ops.dequant_rope_quant_kvcache.api import Columns, run
from jax_kvcache.ops.dequant_rope_quant_kvcache.checks import Call
from jax_kvcache.ops.implementation import Implementation
from jax_kvcache.ops.indexing import take_one


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CacheBase:
    """What both caches hold; see `KVCache` and `PagedKVCache` for the shapes."""

    k_cache: jax.Array
    v_cache: jax.Array
    scale_k: jax.Array
    scale_v: jax.Array
    offset_k: jax.Array | None
    offset_v: jax.Array | None
    layers: int | None = dataclasses.field(metadata={"static": True})
    num_q_heads: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __repr__(self) -> str:
        """The shapes, dtypes and bytes in one line; codes and scales are left out."""

        def text(name: str) -> str:
            field = getattr(self, name)
            shaped = hasattr(field, "shape") and hasattr(field, "dtype")
            return f"{name}={field.dtype.name}{list(field.shape)}" if shaped else f"{name}={field}"

        parts = [text(field.name) for field in dataclasses.fields(self)]
        if all(hasattr(leaf, "size") for leaf in jax.tree.leaves(self)):
            parts.append(f"nbytes={self.nbytes:_}")
        return f"{type(self).__name__}({', '.join(parts)})"

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

    @overload
    def update(
        self,
        x: Columns,
        cos: jax.Array,
        sin: jax.Array,
        positions: ArrayLike,
        *,
        weight_scale: Columns | None = None,
        activation_scale: jax.Array | None = None,
        bias: Columns | None = None,
        block_table: ArrayLike | None = None,
        layer: ArrayLike | None = None,
        axis_name: str | tuple[str, ...] | None = None,
        qkv_shards: int | None = None,
        kv_output: Literal[False] = False,
        implementation: Implementation = None,
    ) -> tuple[jax.Array, Self]: ...

    @overload
    def update(
        self,
        x: Columns,
        cos: jax.Array,
        sin: jax.Array,
        positions: ArrayLike,
        *,
        weight_scale: Columns | None = None,
        activation_scale: jax.Array | None = None,
        bias: Columns | None = None,
        block_table: ArrayLike | None = None,
        layer: ArrayLike | None = None,
        axis_name: str | tuple[str, ...] | None = None,
        qkv_shards: int | None = None,
        kv_output: Literal[True],
        implementation: Implementation = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array, Self]: ...

    def update(
        self,
        x: Columns,
        cos: jax.Array,
        sin: jax.Array,
        positions: ArrayLike,
        *,
        weight_scale: Columns | None = None,
        activation_scale: jax.Array | None = None,
        bias: Columns | None = None,
        block_table: ArrayLike | None = None,
        layer: ArrayLike | None = None,
        axis_name: str | tuple[str, ...] | None = None,
        qkv_shards: int | None = None,
        kv_output: bool = False,
        implementation: Implementation = None,
    ) -> tuple[jax.Array, Self] | tuple[jax.Array, jax.Array, jax.Array, Self]:
        """Writes S tokens of each sequence; see `dequant_rope_quant_kvcache` for the arithmetic.

        Over an automatic mesh give the jitted step `out_shardings` for its caches. Without them JAX
        leaves it to XLA which donated buffer becomes which result, and XLA goes by their bytes: a
        result in front of the caches that is as large as one gets its buffer, and both are copied.

        Args:
          x: [B, S, H] int32, float16, bfloat16 or float32, H = (Nq + 2*Nkv) * D; or a tuple
            (q, k, v) of its columns, and then weight_scale and bias are such tuples too.
          cos: [B, S, 1, D], see `rope_tables`.
          sin: as cos.
          positions: for a `KVCache` [B] int32, the row of each sequence's first token; negative
            skips the sequence, and tokens past the last row are dropped. For a `PagedKVCache`
            [B, S] int32, the position of each token in its sequence; negative skips it.
          weight_scale: [H] float32; required when x is int32, and for int32 alone.
          activation_scale: [B, S] or [B*S] float32; for an int32 x alone.
          bias: [H] float32, float16, bfloat16 or int32; for an int32 x alone.
          block_table: [B, M] int32 for a `PagedKVCache`, see `slots_from_block_table`; a token
            whose block is not allocated, or does not exist, is skipped. None for a `KVCache`.
          layer: the layer to write, an int or an integer scalar; for a cache with layers only. A
            traced one that does not exist writes nothing (q is computed all the same).
          axis_name: inside `jax.shard_map`, the mesh axis, or axes, over which the blocks of a
            `PagedKVCache` or the rows of a `KVCache` are sharded. Positions and block numbers are
            those of the whole cache; each device writes the tokens whose rows it has.
          qkv_shards: the `shards` that the columns of x were interleaved for, inside
            `jax.shard_map`; see `dequant_rope_quant_kvcache`.
          kv_output: whether k and v come back too: to attend over a prompt's own, or to calibrate
            the cache's scales, see `jax_kvcache.numerics`.
          implementation: None, "ffi" or "xla".

        Returns:
          q [B, S, Nq, D] in the dtype of cos, and the cache; with `kv_output` q, k, v and the
          cache, k after RoPE and v [B, S, Nkv, D], both before they are quantised.

        Raises:
          TypeError: a wrong dtype or rank, or an argument that does not go with this cache.
          ValueError: a wrong shape or value.
          NotImplementedError: `implementation="ffi"` where there is no native target.
        """
        first = x[0] if isinstance(x, tuple) and x else x  # what has B and S
        indices, cache_mode = self._indices(first, positions, block_table)
        check_caches(self)
        at = layer_index(self.layers, layer)

        def of_layer(parameter: Any) -> Any:
            if at is None or parameter is None:
                return parameter
            return take_one(parameter, at.number)

        call = Call(
            x=x,
            cos=cos,
            sin=sin,
            k_cache=self.k_cache,
            v_cache=self.v_cache,
            indices=indices,
            scale_k=of_layer(self.scale_k),
            scale_v=of_layer(self.scale_v),
            offset_k=of_layer(self.offset_k),
            offset_v=of_layer(self.offset_v),
            weight_scale=weight_scale,
            activation_scale=activation_scale,
            bias=bias,
            kv_output=kv_output,
            cache_mode=cache_mode,
            implementation=implementation,
            layer=at,
            axes=check_axis_name(axis_name),
            total_q_heads=self.num_q_heads,
            qkv_shards=qkv_shards,
        )
        out = run(call, refuse_without_effect=True)
        cache = dataclasses.replace(self, k_cache=out.k_cache, v_cache=out.v_cache)
        if out.k is None or out.v is None:
            return out.q, cache
        return out.q, out.k, out.v, cache

    def _indices(
        self, x: jax.Array, positions: ArrayLike, block_table: ArrayLike | None
    ) -> tuple[jax.Array, Literal["contiguous", "page"]]:
        """The operator's indices and mode for the tokens at `positions`."""
        raise NotImplementedError
