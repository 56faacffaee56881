"""The few things from JAX's private modules, each with its reason; guarded by tests/test_compat.py.

Written against JAX 0.9.1 (which the public Ascend plugin is made for), 0.10.2 and 0.12.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax import core
from jax._src import checkify, dispatch, xla_bridge
from jax._src.cudnn import fused_attention_stablehlo as fused_attention
from jax._src.interpreters import mlir
from jax.extend.core import Primitive
from jaxlib import xla_client
from jaxlib.mlir.dialects import sdy

# What a type says of manual mesh axes: since JAX 0.10 an object that has the varying axes among
# others, before that the varying axes themselves.
_MANUAL_AXES = "manual_axis_type" if hasattr(core.ShapedArray, "manual_axis_type") else "vma"


def varying_axes(aval: Any) -> frozenset[str]:
    """The manual mesh axes over which an array of this type varies."""
    manual = getattr(aval, _MANUAL_AXES)
    return getattr(manual, "varying", manual)


def shaped_array(shape: Sequence[Any], dtype: Any, sharding: Any, varying_as: Any) -> Any:
    """A type with a sharding, which varies over the manual mesh axes as another type does."""
    manual = {_MANUAL_AXES: getattr(varying_as, _MANUAL_AXES)}
    return core.ShapedArray(shape, dtype, sharding=sharding, **manual)


def nests_manual_axes() -> bool:
    """Whether a shard_map over some mesh axes may be inside one over others, axis indices and all.

    Before JAX 0.10 the program that it makes is refused.
    """
    return jax.__version_info__ >= (0, 10)


def enable_donation(platforms) -> None:
    """Lets `platforms` donate buffers.

    JAX ignores donation with a warning on platforms that it does not know, so a cache would be
    copied at every step, and refuses to export a donating function for a mix of platforms.
    """
    known = mlir._platforms_with_donation
    known.extend(platform for platform in platforms if platform not in known)


def initialized_backends() -> dict[str, str]:
    """The platform name of each initialised backend, by plugin name; initialises none.

    Asking JAX for its devices would initialise every backend, which deciding how to lower a
    function for another machine must not do.
    """
    return {name: client.platform for name, client in xla_bridge._backends.items()}


def plugin_api(plugin: str) -> Any | None:
    """The capsule of a registered plugin's PJRT_Api, or None."""
    registration = xla_bridge._backend_factories.get(plugin)
    return None if registration is None else registration.c_api


def on_plugins_discovered(callback) -> None:
    """Calls `callback(c_api=...)` for each plugin when JAX has discovered them, or now."""
    xla_bridge.register_plugin_callbacks(callback)


def has_custom_call_handler(platform: str) -> bool:
    """Whether a plugin takes FFI targets for `platform` through `jax.ffi`.

    Without such a plugin JAX keeps the targets in a queue, and no runtime gets them.
    """
    return platform in xla_client._custom_callback_handler


def queued_ffi_targets(platform: str) -> set[str]:
    """The names of the FFI targets that JAX still keeps for a plugin of `platform`."""
    return {name for name, *_ in xla_client._custom_callback.get(platform, ())}


def register_custom_call_handler(platform: str, handler) -> None:
    """What a plugin does to take FFI targets through `jax.ffi`."""
    xla_client.register_custom_call_handler(platform, handler)


def register_plugin(name: str, library_path: str, options: dict[str, Any]) -> None:
    """Registers a PJRT plugin as the default backend."""
    xla_bridge.register_plugin(name, priority=500, library_path=library_path, options=options)


def backends_are_initialized() -> bool:
    """Whether it is too late to register a plugin."""
    return xla_bridge.backends_are_initialized()


def requires_devices_during_lowering(primitive: Primitive) -> None:
    """Lets the lowering of `primitive` use custom_partitioning, which asks for the devices.

    JAX leaves them out of the lowering context unless a primitive of the program is known to need
    them, and looks no further than the program's own primitives.
    """
    dispatch.prim_requires_devices_during_lowering.add(primitive)


def num_automatic_devices(ctx) -> int:
    """How many devices XLA's partitioner spreads the program that is being lowered over."""
    return getattr(ctx.module_context.axis_context, "num_devices", 1)


_keep_sharding_p = Primitive("keep_sharding")
_keep_sharding_p.def_abstract_eval(lambda value: value)


def _lower_keep_sharding(ctx, value):
    if not jax.config.jax_use_shardy_partitioner:
        return [value]
    return [sdy.PropagationBarrierOp(value, sdy.PropagationDirection.FORWARD).result]


mlir.register_lowering(_keep_sharding_p, _lower_keep_sharding)


def keep_sharding_of(value: jax.Array) -> jax.Array:
    """The value, with a sharding that what comes after it cannot change.

    Shardy propagates shardings in both directions, and JAX has no name for its barrier, which lets
    them through in one.
    """
    return _keep_sharding_p.bind(value)


def is_export(ctx) -> bool:
    """Whether the program is being lowered by jax.export."""
    return ctx.module_context.lowering_parameters.for_export


class Finding(NamedTuple):
    """What a check finds in a call of a primitive under `jax.experimental.checkify`.

    Attributes:
      failed: bool scalar.
      message: with a name in braces for each number.
      numbers: scalars.
      out_of_bounds: whether it is an index error too, which `checkify.index_checks` asks for.
    """

    failed: jax.Array
    message: str
    numbers: dict[str, jax.Array]
    out_of_bounds: bool


def add_checks(primitive: Primitive, findings: Callable[..., Iterable[Finding]]) -> None:
    """Makes `jax.experimental.checkify` report what `findings` finds in a call of `primitive`.

    A check in the program itself would stay there when nobody looks. JAX has no public way to give
    a primitive a rule. In JAX 0.12 a rule has a context in front of its other arguments.

    Args:
      primitive: with multiple results.
      findings: of the primitive's operands and parameters.
    """

    assert_func: Any = checkify.assert_func

    def rule(*arguments: Any, **params: Any) -> tuple[Any, Any]:
        has_context = not isinstance(arguments[0], checkify.Error)
        context, (error, enabled, *operands) = arguments[:has_context], arguments[has_context:]
        for found in findings(*operands, **params):
            kinds: list[Any] = [checkify.FailedCheckError]
            kinds += [checkify.OOBError] if found.out_of_bounds else []
            if any(kind in enabled for kind in kinds):
                trace = checkify.get_traceback()
                failure = checkify.FailedCheckError(trace, found.message, **found.numbers)
                error = assert_func(*context, error, found.failed, failure)
        return error, primitive.bind(*operands, **params)

    checkify.error_checks[primitive] = rule


def has_cudnn() -> bool:
    """Whether JAX was built with cuDNN."""
    return fused_attention.cuda_versions is not None


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    mask: jax.Array | None = None,
    kv_lengths: jax.Array | None = None,
    causal: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`jax.nn.dot_product_attention` by cuDNN, with its log-sum-exp as float32.

    The public function rounds the log-sum-exp to q's dtype. In 16 bits that is too coarse to merge
    results by.

    Args:
      q: [B, S, Nq, D] bfloat16 or float16.
      k, v: [B, rows, Nkv, D], as q.
      scale: factor of the scores.
      mask: [B, 1, S, rows] bool.
      kv_lengths: [B] int32, how many rows each sequence has.
      causal: whether query s sees no row past row s; with `kv_lengths`.

    Returns:
      out, like q, and lse [B, S, Nq] float32.
    """
    kinds = fused_attention.MaskType
    lengths, mask_type = None, kinds.NO_MASK
    if kv_lengths is not None:
        lengths = jax.numpy.full(q.shape[:1], q.shape[1], jax.numpy.int32)
        mask_type = kinds.PADDING_CAUSAL if causal else kinds.PADDING
    out, lse = fused_attention.dot_product_attention(
        q, k, v, None, mask, lengths, kv_lengths,
        scale=scale,
        mask_type=mask_type,
        return_residual=True,
    )  # fmt: skip
    return out, lse.transpose(0, 2, 1).astype(jax.numpy.float32)
