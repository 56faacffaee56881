"""What makes a primitive of an operator: its rules, read off the operand tables, and its lowering.

There is one lowering rule for all platforms, so that plugins that JAX discovers late, lowering for
another platform and `jax.export` all go through it: `jax.lax.platform_dependent` over an inner
primitive, whose own lowering sees one platform and decides there.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import core, lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from jax_kvcache import backends, mesh, modes
from jax_kvcache._compat import (
    requires_devices_during_lowering,
    shaped_array,
    varying_axes,
)
from jax_kvcache.ops.implementation import Options, choose
from jax_kvcache.ops.operands import (
    aliases,
    flat_shape,
    flattened,
    is_absent,
    shape_of,
    sizes_of,
    table,
    varying_alike,
    with_leading_group,
)


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
      name: of the primitive, of the FFI target on every platform, and of its files in `ffi/`.
      operands: the table of its operands.
      results: the table of its results.
      derived: adds the sizes that follow from the operands' sizes.
      reference: its jax.numpy implementation, of operands, options and the platform lowered for.
      sharding: how it is spread over a mesh.
    """

    name: str
    operands: type
    results: type
    derived: Callable[[dict[str, tuple[Any, ...]]], dict[str, tuple[Any, ...]]]
    reference: Callable[[Any, Any, str], Any]
    sharding: mesh.Sharding

    def bind(self, primitive: Primitive, operands: Any, options: Options) -> list[jax.Array]:
        """Binds the primitive, with operands that vary over mesh axes as the results need it."""
        varying = {
            name: varying_axes(jax.typeof(operand)) for name, operand in operands._asdict().items()
        }
        more = varying_alike(operands, self.results, varying)
        operands = [
            lax.pcast(a, axes, to="varying") for a, axes in zip(operands, more, strict=True)
        ]
        return primitive.bind(*operands, options=options)


def define(operator: Operator) -> Primitive:
    """Makes an operator's primitive and gives it its rules."""
    primitive, native = Primitive(operator.name), Primitive(f"{operator.name}_native")
    primitive.multiple_results = native.multiple_results = True
    types = functools.partial(_result_types, operator)
    primitive.def_abstract_eval(lambda *avals, options: types(avals, options))
    native.def_abstract_eval(lambda *avals, options, platform: types(avals, options))
    _evaluate_outside_jit(primitive)
    _batch(operator, primitive)
    _lower(operator, primitive, native)
    return primitive


# Shapes, dtypes and types


def _result_types(operator: Operator, avals: Sequence[Any], options: Options) -> list[Any]:
    ops: Any = operator.operands(*avals)
    rows = table(operator.results).values()
    sizes = operator.derived(sizes_of(ops))
    wanted = [row.option is None or getattr(options, row.option) for row in rows]
    shapes = [
        shape_of(row.dims, sizes) if want else (0,) for row, want in zip(rows, wanted, strict=True)
    ]
    dtypes = [
        jnp.dtype("float32") if row.dtype_of is None else getattr(ops, row.dtype_of).dtype
        for row in rows
    ]
    on = mesh.mesh_of(avals)
    if on.empty:
        return [core.ShapedArray(s, d) for s, d in zip(shapes, dtypes, strict=True)]
    layout = operator.sharding.layout(on, ops, None, options)
    specs = operator.sharding.result_specs(layout, shapes)
    # `Operator.bind` has made the operands that a result reads vary alike.
    most = max(avals, key=lambda aval: len(varying_axes(aval)))
    vary = [getattr(ops, row.reads[0]) if row.reads else most for row in rows]
    return [
        shaped_array(s, d, NamedSharding(on, spec), varying_as=v)
        for s, d, spec, v in zip(shapes, dtypes, specs, vary, strict=True)
    ]


# Evaluation outside jit


def _evaluate_outside_jit(primitive: Primitive) -> None:
    @functools.partial(jax.jit, static_argnames="options")
    def jitted(*operands, options):
        return primitive.bind(*operands, options=options)

    @primitive.def_impl
    def impl(*operands, options):
        with jax.disable_jit(False):
            return jitted(*operands, options=options)


# Batching


def _batch(operator: Operator, primitive: Primitive) -> None:
    def rule(operands, dims, *, options):
        """Prepends the mapped axis to the group dimensions; nothing is folded or looped over."""
        mapped = [(a, d) for a, d in zip(operands, dims, strict=True) if d is not None]
        size = mapped[0][0].shape[mapped[0][1]]
        on = mesh.mesh_of(map(jax.typeof, operands))
        # explicit mode: the mesh axis that the mapped axis is sharded over, if any
        shards = next(filter(None, (jax.typeof(a).sharding.spec[d] for a, d in mapped)), None)

        def broadcast(operand):
            spec = jax.typeof(operand).sharding.spec
            where = None if shards is None else NamedSharding(on, PartitionSpec(shards, *spec))
            return lax.broadcast(operand, (size,), out_sharding=where)

        batched = with_leading_group(operator.operands(*operands), dims, broadcast)
        results = operator.bind(primitive, batched, options)
        return results, [None if is_absent(result) else 0 for result in results]

    batching.primitive_batchers[primitive] = rule


# Lowering


def _result_like(result: Any, extra: jax.ShapeDtypeStruct) -> Any:
    """The type of a further result that is on the devices of `result`, in their own memory."""
    spec = PartitionSpec(*[None] * len(extra.shape))
    sharding = result.sharding.update(spec=spec)
    return result.update(shape=extra.shape, dtype=jnp.dtype(extra.dtype), sharding=sharding)


def _native_call(
    operator: Operator, operands: Any, types: Sequence[Any], options, platform
) -> list:
    """The custom call of a platform's native target.

    Where a program adds or removes a dimension of size 1 by a reshape (for example the one token of
    a sequence), XLA may choose a layout with that dimension first, and then copies the array to the
    row-major layout that the call demands, although the bytes are in the same order. It does not do
    so for arrays of one dimension. So operands and results that the tables mark as flat are
    reshaped to one dimension before the call and back after it.
    """
    backend = backends.find(platform)
    assert backend is not None, "chosen above"
    target = backend.targets[operator.name]
    scratch = [_result_like(types[0], extra) for extra in target.scratch(operands)]
    operands = target.prepare(flattened(operands))
    rows = list(table(operator.results).values())

    def declared(row, aval):
        if not row.flat:
            return aval
        flat = aval.sharding.update(spec=PartitionSpec(None))
        return aval.update(shape=flat_shape(aval.shape), sharding=flat)

    call = jax.ffi.ffi_call(
        operator.name,
        [*(declared(row, aval) for row, aval in zip(rows, types, strict=True)), *scratch],
        input_output_aliases=aliases(operator.operands, operator.results),
    )
    results = call(*operands, **options.attributes())[: len(rows)]
    return [
        result.reshape(aval.shape) if row.flat else result
        for row, result, aval in zip(rows, results, types, strict=True)
    ]


def _lower(operator: Operator, primitive: Primitive, native: Primitive) -> None:
    def reference(*operands, options, platform):
        with jax.named_scope(operator.name):
            return list(operator.reference(operator.operands(*operands), options, platform))

    def reference_of_one_device(*operands, options, platform):
        """The reference, whose flat results are flattened too, for the reason in `_native_call`."""
        results = list(reference(*operands, options=options, platform=platform))
        for i, row in enumerate(table(operator.results).values()):
            if row.flat:  # computed in its own shape: working out its indices is slow on CPU
                flat = lax.optimization_barrier(lax.optimization_barrier(results[i]).reshape(-1))
                results[i] = flat.reshape(results[i].shape)
        return results

    def native_call(*operands, options, platform):
        types = _result_types(operator, list(map(jax.typeof, operands)), options)
        with jax.named_scope(operator.name):
            return _native_call(operator, operator.operands(*operands), types, options, platform)

    def native_lowering(ctx, *operands, options, platform):
        """Emits the platform's native call; where it cannot be had, raises, warns or is silent."""
        if platform is None:
            platform = " and ".join(ctx.module_context.platforms)
        asked = options.implementation
        choice = choose(operator.name, platform, operator.operands(*ctx.avals_in), asked)
        emit = native_call if choice.native else reference_of_one_device
        if asked == "ffi" and not choice.native:
            raise NotImplementedError(f'`implementation="ffi"`: {choice.reason}.')
        if choice.surprising:
            warnings.warn(
                f"{operator.name} runs its XLA implementation on {platform}: {choice.reason}.",
                stacklevel=2,
            )
        emit = functools.partial(emit, options=options, platform=platform)
        return mlir.lower_fun(emit)(ctx, *operands)

    mlir.register_lowering(native, native_lowering)

    def on_one_device(*operands, options):
        """The call of one device, on whichever platform is lowered."""

        def branch(platform):
            return functools.partial(native.bind, platform=platform, options=options)

        branches = {platform: branch(platform) for platform in backends.PLATFORMS}
        return lax.platform_dependent(*operands, default=branch(None), **branches)

    def lowering(ctx, *operands, options):
        platform = " and ".join(ctx.module_context.platforms)
        plain = functools.partial(reference, options=options, platform=platform)
        call = mesh.Call(
            operator.name, operator.operands, operator.results, on_one_device, plain, options
        )
        return mlir.lower_fun(modes.partitioned(ctx, call, operator.sharding))(ctx, *operands)

    requires_devices_during_lowering(primitive)
    mlir.register_lowering(primitive, lowering)
