"""The primitive of `decode_attention`."""

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_kvcache._compat import add_checks
from jax_kvcache.mesh import Call
from jax_kvcache.modes import reference_over_mesh
from jax_kvcache.ops.decode_attention.debug import findings
from jax_kvcache.ops.decode_attention.reference import (
    AttentionOptions,
    Operands,
    Results,
    decode_attention_reference,
)
from jax_kvcache.ops.decode_attention.sharding import SHARDING
from jax_kvcache.ops.operator import Operator, define

NAME = "decode_attention"

OPERATOR = Operator(
    name=NAME,
    operands=Operands,
    results=Results,
    derived=lambda sizes: sizes,
    reference=decode_attention_reference,
    sharding=SHARDING,
)
decode_attention_p = define(OPERATOR)
add_checks(
    decode_attention_p,
    lambda *operands, options: findings(Operands(*operands), options),
)


def bind(operands: Operands, options: AttentionOptions) -> list[jax.Array]:
    """Binds the primitive; returns the results of the table `Results`."""
    return OPERATOR.bind(decode_attention_p, operands, options)


def _jvp(primals, tangents, *, options):
    """Forward-mode derivatives, by q, scales, offsets and sinks: those of the reference.

    The results themselves are those of the call.
    """
    results = bind(Operands(*primals), options)
    moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]
    moving = [i for i in moving if primals[i].dtype.kind not in "iub"]

    def reference(*operands, options):
        return decode_attention_reference(Operands(*operands), options, "cpu")

    call = Call(NAME, Operands, Results, reference, reference, options)
    shapes = [result.shape for result in results]

    def of_moving(*values):
        operands = list(primals)
        for i, value in zip(moving, values, strict=True):
            operands[i] = value
        return list(reference_over_mesh(call, SHARDING, shapes, *operands))

    values = [primals[i] for i in moving]
    _, moved = jax.jvp(of_moving, values, [tangents[i] for i in moving])
    return results, [_forward_only_p.bind(tangent) for tangent in moved]


ad.primitive_jvps[decode_attention_p] = _jvp


# What reverse mode meets first: it goes through the tangents from their end. Otherwise the error
# would be about the reference's loop.
def _no_transpose(cotangent, operand):
    raise NotImplementedError(
        "decode_attention is an inference operator and has no reverse-mode derivative (jax.grad, "
        "jax.vjp): use jax.jvp or jax.jacfwd, or jax.lax.stop_gradient on its inputs."
    )


_forward_only_p = Primitive("decode_attention_forward_only")
_forward_only_p.def_impl(lambda tangent: tangent)
_forward_only_p.def_abstract_eval(lambda tangent: tangent)
ad.deflinear2(_forward_only_p, _no_transpose)
batching.defvectorized(_forward_only_p)
mlir.register_lowering(_forward_only_p, lambda ctx, tangent: [tangent])
