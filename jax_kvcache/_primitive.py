"""The primitive: shape rule, dtype rule, abstract evaluation, batching and lowerings."""

import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import core, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from jax_kvcache import _ascend, _ffi
from jax_kvcache._compat import requires_devices_during_lowering
from jax_kvcache._layout import PER_GROUP, layout_of, mesh_of, result_specs
from jax_kvcache._partition import partitioned
from jax_kvcache._reference import Operands, dequant_rope_quant_kvcache_reference

dequant_rope_quant_kvcache_p = Primitive("dequant_rope_quant_kvcache")
dequant_rope_quant_kvcache_p.multiple_results = True

# Carries a call to one platform's native target, or refuses it, when that platform is lowered.
_native_p = Primitive("dequant_rope_quant_kvcache_native")
_native_p.multiple_results = True


def dequant_rope_quant_kvcache_canonical(
    operands: Operands,
    *,
    kv_output: bool,
    indices_mode: str,
    implementation: str | None,
):
    """Binds the primitive.

    Args:
      operands: see `Operands`.
      kv_output: whether k and v are results; [0] otherwise.
      indices_mode: "drop" or "promise_in_bounds".
      implementation: None, "ffi" or "xla".

    Returns:
      q [*g, T, Nq, D], k and v [*g, T, Nkv, D] or [0], k_cache, v_cache.
    """
    return dequant_rope_quant_kvcache_p.bind(
        *_vary_alike(operands),
        kv_output=kv_output,
        indices_mode=indices_mode,
        implementation=implementation,
    )


# What q, k and v are made of; the caches are made of all operands
_TOKENS = ("x", "cos", "sin", "weight_scale", "activation_scale", "bias")


def _vary_alike(operands: Operands):
    """Under shard_map: q, k and v vary over the mesh axes of their operands, the caches over all.

    So q of tokens that every device has is known to be the same everywhere, also where each device
    writes its own part of the cache.
    """
    varying = {
        name: jax.typeof(operand).manual_axis_type.varying
        for name, operand in operands._asdict().items()
    }
    tokens = frozenset().union(*(varying[name] for name in _TOKENS))
    everything = frozenset().union(*varying.values())
    return [
        lax.pcast(
            operand,
            tuple((tokens if name in _TOKENS else everything) - varying[name]),
            to="varying",
        )
        for name, operand in operands._asdict().items()
    ]


# Shapes, dtypes and types


def _shape_rule(ops: Operands, kv_output: bool):
    *tokens, width = ops.x.shape
    num_kv_heads, head_dim = ops.k_cache.shape[-2:]
    num_q_heads = width // head_dim - 2 * num_kv_heads
    kv = (*tokens, num_kv_heads, head_dim) if kv_output else (0,)
    return (*tokens, num_q_heads, head_dim), kv, kv, ops.k_cache.shape, ops.v_cache.shape


def _dtype_rule(ops: Operands):
    return ops.cos.dtype, ops.cos.dtype, ops.cos.dtype, ops.k_cache.dtype, ops.v_cache.dtype


def _abstract_eval(*avals, kv_output, indices_mode, implementation):
    ops: Any = Operands(*avals)
    shapes, dtypes = _shape_rule(ops, kv_output), _dtype_rule(ops)
    mesh = mesh_of(avals)
    if mesh.empty:
        return [core.ShapedArray(s, d) for s, d in zip(shapes, dtypes, strict=True)]
    specs = result_specs(layout_of(mesh, ops), kv_output)
    vary = [a.manual_axis_type for a in (ops.x, ops.x, ops.x, ops.k_cache, ops.v_cache)]
    return [
        core.ShapedArray(
            shape,
            dtype,
            sharding=NamedSharding(mesh, spec),
            manual_axis_type=varying,
        )
        for shape, dtype, spec, varying in zip(shapes, dtypes, specs, vary, strict=True)
    ]


dequant_rope_quant_kvcache_p.def_abstract_eval(_abstract_eval)


# Evaluation outside jit


@functools.partial(jax.jit, static_argnames=("kv_output", "indices_mode", "implementation"))
def _jitted(*operands, **params):
    return dequant_rope_quant_kvcache_p.bind(*operands, **params)


@dequant_rope_quant_kvcache_p.def_impl
def _impl(*operands, **params):
    with jax.disable_jit(False):
        return _jitted(*operands, **params)


# Differentiation and batching


def _jvp(primals, tangents, **params):
    raise NotImplementedError(
        "dequant_rope_quant_kvcache is an inference operator and has no derivative: rounding to "
        "int8 has a zero gradient almost everywhere. Use jax.lax.stop_gradient on its inputs."
    )


ad.primitive_jvps[dequant_rope_quant_kvcache_p] = _jvp


def _batch(operands, dims, **params):
    """Prepends the mapped axis to the group dimensions; nothing is folded or looped over."""
    mapped = [(a, d) for a, d in zip(operands, dims, strict=True) if d is not None]
    size = mapped[0][0].shape[mapped[0][1]]
    mesh = mesh_of(map(jax.typeof, operands))
    # explicit mode: the mesh axis that the mapped axis is sharded over, if any
    shards = next(filter(None, (jax.typeof(a).sharding.spec[d] for a, d in mapped)), None)

    def prepend(name, operand, dim):
        if dim is not None:
            return operand if dim == 0 else jnp.moveaxis(operand, dim, 0)
        if operand.shape == (0,):  # an absent optional
            return operand
        if name not in PER_GROUP:
            return jnp.expand_dims(operand, 0)
        spec = jax.typeof(operand).sharding.spec
        where = None if shards is None else NamedSharding(mesh, PartitionSpec(shards, *spec))
        return lax.broadcast(operand, (size,), out_sharding=where)

    batched = map(prepend, Operands._fields, operands, dims)
    results = dequant_rope_quant_kvcache_canonical(Operands(*batched), **params)
    return results, [0 if params["kv_output"] or i not in (1, 2) else None for i in range(5)]


batching.primitive_batchers[dequant_rope_quant_kvcache_p] = _batch


# Lowering: one default rule for all platforms, so that plugins discovered late, cross-platform
# lowering and export take the same road


def native_operands(ops: Operands) -> Operands:
    """What the native target takes: the tables in one dimension, everything else as it is.

    XLA lays out a reshape that only adds or takes a dimension of size 1 (a table's head, the one
    token of a sequence) with that dimension first, and then copies the array to name the same bytes
    otherwise. To and from one dimension it does not; so the target returns q, k and v flat, too.
    """
    return ops._replace(cos=ops.cos.reshape(-1), sin=ops.sin.reshape(-1))


def _native_call(*operands, platform, kv_output, **_):
    *projections, k_cache, v_cache = _abstract_eval(
        *map(jax.typeof, operands), kv_output=kv_output, indices_mode="", implementation=None
    )
    flat = [
        a.update(shape=(math.prod(a.shape),), sharding=a.sharding.update(spec=PartitionSpec(None)))
        for a in projections
    ]
    ops = native_operands(Operands(*operands))
    if platform in _ascend.PLATFORMS:
        ops = _ascend.native_operands(ops)
    call = jax.ffi.ffi_call(
        _ffi.TARGET, [*flat, k_cache, v_cache], input_output_aliases={3: 3, 4: 4}
    )
    *outputs, k_cache, v_cache = call(*ops, kv_output=kv_output)
    outputs = [a.reshape(aval.shape) for a, aval in zip(outputs, projections, strict=True)]
    return [*outputs, k_cache, v_cache]


def _native_abstract_eval(*avals, platform, **params):
    return _abstract_eval(*avals, **params)


_native_p.def_abstract_eval(_native_abstract_eval)


def _xla_call(*operands, **params):
    return list(dequant_rope_quant_kvcache_reference(*operands, **params))


def _native_lowering(ctx, *operands, platform, implementation, **params):
    """Emits the platform's native call; where it cannot be had, raises, warns or says nothing."""
    if platform is None:
        platform = " and ".join(ctx.module_context.platforms)
    reason = _ffi.refusal(platform, Operands(*ctx.avals_in))
    if reason is None:
        return mlir.lower_fun(_native_call)(ctx, *operands, platform=platform, **params)
    if implementation == "ffi":
        raise NotImplementedError(f'`implementation="ffi"`: {reason}.')
    if platform in _ffi.NATIVE_PLATFORMS:
        warnings.warn(
            f"dequant_rope_quant_kvcache runs its XLA implementation on {platform}: {reason}.",
            stacklevel=2,
        )
    return mlir.lower_fun(_xla_call)(ctx, *operands, **params)


mlir.register_lowering(_native_p, _native_lowering)


def _call_on_platform(*operands, implementation, **params):
    """The call of one device, on whichever platform is lowered."""
    if implementation == "xla":
        return _xla_call(*operands, **params)

    def branch(platform):
        return functools.partial(
            _native_p.bind, platform=platform, implementation=implementation, **params
        )

    branches = {platform: branch(platform) for platform in _ffi.NATIVE_PLATFORMS}
    return lax.platform_dependent(*operands, default=branch(None), **branches)


def _lowering(ctx, *operands, **params):
    one_device = functools.partial(_call_on_platform, **params)
    return mlir.lower_fun(partitioned(ctx, one_device, params["kv_output"]))(ctx, *operands)


requires_devices_during_lowering(dequant_rope_quant_kvcache_p)
mlir.register_lowering(dequant_rope_quant_kvcache_p, _lowering)
