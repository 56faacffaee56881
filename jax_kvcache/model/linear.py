"""The linear layers of a decoder: float or int8 weights, and what each hands to the operator."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_ROWS_BY_ROWS = (((1,), (1,)), ((), ()))  # [rows, in] times [out, in] is [rows, out]


class Projected(NamedTuple):
    """A linear layer's output as `dequant_rope_quant_kvcache` takes it.

    Attributes:
      x: [..., out] int32 accumulators, or float32 values that lack nothing.
      weight_scale: [out] float32; None with float x, and so are the next two.
      activation_scale: [...] float32, one per token, or None.
      bias: [out] int32 (added to the accumulators) or float32 (added last), or None.
    """

    x: jax.Array
    weight_scale: jax.Array | None = None
    activation_scale: jax.Array | None = None
    bias: jax.Array | None = None

    def dequantize(self) -> jax.Array:
        """[..., out] float32, in the operator's order of operations."""
        if self.weight_scale is None:
            return self.x
        x, bias = self.x, self.bias
        if bias is not None and bias.dtype == jnp.int32:
            x, bias = x + per_column(bias, x), None
        y = x.astype(jnp.float32) * per_column(self.weight_scale, x)
        if self.activation_scale is not None:
            y = y * self.activation_scale[..., None]
        return y if bias is None else y + per_column(bias, y)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FloatLinear:
    """Weights as they are, computed in float32.

    Attributes:
      weight: [out, in] float32 or bfloat16.
      bias: [out] float32, or None.
    """

    weight: jax.Array
    bias: jax.Array | None = None

    def project(self, h: jax.Array) -> Projected:
        """h [..., in] float32 -> [..., out]."""
        y = matmul(h, self.weight)
        return Projected(y if self.bias is None else y + per_column(self.bias, y))

    def __call__(self, h: jax.Array) -> jax.Array:
        """h [..., in] float32 -> [..., out] float32."""
        return self.project(h).dequantize()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DynamicInt8Linear:
    """W8A8 with a scale per token that is made when the token comes: its largest / 127.

    Attributes:
      weight: [out, in] int8.
      weight_scale: [out] float32.
      bias: [out] float32, or None.
    """

    weight: jax.Array
    weight_scale: jax.Array
    bias: jax.Array | None = None

    def project(self, h: jax.Array) -> Projected:
        """h [..., in] float32 -> int32 accumulators [..., out] and their scales."""
        largest = jnp.max(jnp.abs(h), axis=-1)
        scale = _step_of(largest)
        codes = _quantize(h, scale[..., None])
        return Projected(matmul_int8(codes, self.weight), self.weight_scale, scale, self.bias)

    def __call__(self, h: jax.Array) -> jax.Array:
        """h [..., in] float32 -> [..., out] float32."""
        return self.project(h).dequantize()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StaticInt8Linear:
    """W8A8 with one scale and offset for every input, found by calibration.

    Attributes:
      weight: [out, in] int8.
      input_scale: [] float32; the code of a is rint(a / input_scale + input_offset).
      input_offset: [] float32, in codes.
      weight_scale: [out] float32, of the accumulators: it includes the input's scale.
      bias: [out] int32, which holds the correction for `input_offset` too; or float32 where there
        is no offset; or None.
    """

    weight: jax.Array
    input_scale: jax.Array
    input_offset: jax.Array
    weight_scale: jax.Array
    bias: jax.Array | None

    def project(self, h: jax.Array) -> Projected:
        """h [..., in] float32 -> int32 accumulators [..., out] and their scale."""
        codes = _quantize(h, self.input_scale, self.input_offset)
        accumulators = matmul_int8(codes, self.weight)
        return Projected(accumulators, self.weight_scale, None, self.bias)

    def __call__(self, h: jax.Array) -> jax.Array:
        """h [..., in] float32 -> [..., out] float32."""
        return self.project(h).dequantize()


Linear = FloatLinear | DynamicInt8Linear | StaticInt8Linear


def quantize_weight(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Symmetric int8 per output channel: the weight's codes, and their scale largest / 127.

    Args:
      weight: [out, in] float.

    Returns:
      [out, in] int8 and [out] float32.
    """
    weight = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weight), axis=1)
    scale = _step_of(largest)
    return _quantize(weight, scale[:, None]), scale


def _step_of(largest: jax.Array) -> jax.Array:
    """The scale with which the largest value has the code 127; 1 where all values are 0."""
    return jnp.where(largest > 0, largest / 127, jnp.ones_like(largest))


def _quantize(values: jax.Array, scale: jax.Array, offset: jax.Array | None = None) -> jax.Array:
    """clip(rint(values / scale + offset), -128, 127) int8, with a true division."""
    # XLA would turn a division by a broadcast number into a product with its reciprocal.
    z = values / lax.optimization_barrier(jnp.broadcast_to(scale, values.shape))
    z = z if offset is None else z + jnp.broadcast_to(offset, z.shape)
    return jnp.clip(jnp.rint(z), -128, 127).astype(jnp.int8)


def per_column(parameter: jax.Array, x: jax.Array) -> jax.Array:
    """A parameter [out] with unit dimensions in front, for x [..., out]."""
    return jnp.expand_dims(parameter, tuple(range(x.ndim - 1)))


def matmul_int8(codes: jax.Array, weight: jax.Array) -> jax.Array:
    """[..., in] int8 times [out, in] int8 is [..., out] int32.

    XLA's CPU backend multiplies one row by a loop of its own and more rows by a library: for
    weights of 8960 x 1536 one row took 24 ms and two rows 0.9 ms on one server CPU. So one row is
    multiplied twice. (Weights stay [out, in] as the files have them: [in, out] took 3 times as
    long.)
    """
    rows = codes.reshape(-1, codes.shape[-1])
    count = rows.shape[0]
    if count == 1:
        rows = jnp.concatenate([rows, rows])
    product = lax.dot_general(rows, weight, _ROWS_BY_ROWS, preferred_element_type=jnp.int32)
    return product[:count].reshape(*codes.shape[:-1], weight.shape[0])


def matmul(h: jax.Array, weight: jax.Array) -> jax.Array:
    """[..., in] float32 times [out, in] float32 or bfloat16 is [..., out] float32.

    With bfloat16 weights, h is split into three bfloat16 parts that add up to it and are rows of
    one product with float32 sums. That is as exact as float32, and on a CPU it is faster than to
    widen the weights: 1 ms instead of 33 ms for one row and weights of 8960 x 1536.
    """
    rows = h.reshape(-1, h.shape[-1])
    count = rows.shape[0]
    if weight.dtype == jnp.bfloat16:
        product = lax.dot_general(
            jnp.concatenate(_bfloat16_parts(rows)),
            weight,
            _ROWS_BY_ROWS,
            preferred_element_type=jnp.float32,
        )
        high, middle, low = product.reshape(3, count, -1)
        product = high + (middle + low)
    else:
        product = lax.dot_general(rows, weight, _ROWS_BY_ROWS, precision=lax.Precision.HIGHEST)
    return product.reshape(*h.shape[:-1], weight.shape[0])


def _bfloat16_parts(values: jax.Array) -> list[jax.Array]:
    """Three bfloat16 arrays whose sum is the float32 array."""
    parts = []
    for _ in range(3):
        # `reduce_precision`, because XLA may drop a conversion to bfloat16 and back.
        part = lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        values = values - part
    return parts
