"""Says which implementation a call of `decode_attention` would run, and why."""

from typing import Any

import jax
from jax.typing import ArrayLike

from jax_kvcache.caches import KVCache, PagedKVCache
from jax_kvcache.mesh import mesh_of
from jax_kvcache.modes import no_partitioning
from jax_kvcache.ops.decode_attention import cudnn
from jax_kvcache.ops.decode_attention.api import canonical_operands
from jax_kvcache.ops.decode_attention.checks import Call
from jax_kvcache.ops.decode_attention.primitive import NAME
from jax_kvcache.ops.decode_attention.reference import AttentionOptions
from jax_kvcache.ops.implementation import Explanation, Implementation, explain_choice


def explain_attention(
    q: jax.Array | jax.ShapeDtypeStruct,
    cache: KVCache | PagedKVCache,
    lengths: ArrayLike | jax.ShapeDtypeStruct | None = None,
    *,
    positions: ArrayLike | jax.ShapeDtypeStruct | None = None,
    block_table: ArrayLike | jax.ShapeDtypeStruct | None = None,
    layer: ArrayLike | jax.ShapeDtypeStruct | None = None,
    scale: ArrayLike | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | jax.ShapeDtypeStruct | None = None,
    return_lse: bool = False,
    implementation: Implementation = None,
    platform: str | None = None,
) -> Explanation:
    """Says which implementation `decode_attention` would run for these arguments.

    Nothing is computed: arrays, the cache's too (`jax.eval_shape` of its `create`), may be given as
    `jax.ShapeDtypeStruct`. Over automatic mesh axes beside manual or explicit ones, over automatic
    axes in `jax.export`, and on a platform without custom partitioning the operations of the
    reference are emitted instead; the first is seen here, where the arrays say so. That a cache's
    rows or blocks are sharded is not: devices then merge their parts in float32, without cuDNN.

    Args:
      q, cache, lengths, positions, block_table, layer, scale, window, soft_cap, sinks, return_lse,
      implementation: as for `decode_attention`.
      platform: the platform to answer for; None is JAX's default backend.

    Returns:
      An `Explanation` (platform, implementation, reason).

    Raises:
      TypeError, ValueError: as `decode_attention`.
    """
    call = Call(
        q, cache, lengths, positions, None, block_table, layer, scale, window, soft_cap, sinks,
        return_lse, implementation,
    )  # fmt: skip
    operands, options = _operand_types(call)
    answer = explain_choice(NAME, platform, operands, implementation)
    if answer.implementation == "xla" and answer.platform in ("cuda", "gpu"):
        reason = cudnn.refusal(operands, options)
        how = "by cuDNN in float16" if reason is None else f"not by cuDNN: {reason}"
        return answer._replace(reason=f"{answer.reason}; {how}")
    mesh = mesh_of([jax.typeof(q)]) if isinstance(q, jax.Array) else None
    if answer.implementation == "ffi" and mesh is not None and not mesh.empty:
        reason = no_partitioning(NAME, mesh, 1, (answer.platform,), False)
        if reason is not None:
            runs = None if implementation == "ffi" else "xla"
            return Explanation(answer.platform, runs, reason)
    return answer


def _operand_types(call: Call) -> tuple[Any, AttentionOptions]:
    """The types of the primitive's operands, without any array's values, and its options."""

    def is_array(value: Any) -> bool:
        return hasattr(value, "shape") and hasattr(value, "dtype")

    arrays = {
        name: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), value)
        for name, value in call._asdict().items()
        if is_array(value) or isinstance(value, KVCache | PagedKVCache)
    }
    found: list[AttentionOptions] = []

    def operands(arrays: dict[str, Any]) -> Any:
        operands, options, _ = canonical_operands(call._replace(**arrays))
        found.append(options)
        return operands

    types = jax.eval_shape(operands, arrays)
    return types, found[0]
