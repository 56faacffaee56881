"""The primitive of `dequant_rope_quant_kvcache`."""

import jax
from jax.interpreters import ad

from jax_kvcache._compat import add_checks
from jax_kvcache.ops.dequant_rope_quant_kvcache.debug import findings
from jax_kvcache.ops.dequant_rope_quant_kvcache.reference import (
    Operands,
    Results,
    WriteOptions,
    dequant_rope_quant_kvcache_reference,
)
from jax_kvcache.ops.dequant_rope_quant_kvcache.sharding import SHARDING
from jax_kvcache.ops.operator import Operator, define

NAME = "dequant_rope_quant_kvcache"


def _derived(sizes):
    (H,), (Nkv,), (D,) = sizes["H"], sizes["Nkv"], sizes["D"]
    return sizes | {"Nq": (H // D - 2 * Nkv,)}


OPERATOR = Operator(
    name=NAME,
    operands=Operands,
    results=Results,
    derived=_derived,
    reference=dequant_rope_quant_kvcache_reference,
    sharding=SHARDING,
)
dequant_rope_quant_kvcache_p = define(OPERATOR)
add_checks(
    dequant_rope_quant_kvcache_p,
    lambda *operands, options: findings(Operands(*operands), options),
)


def bind(operands: Operands, options: WriteOptions) -> list[jax.Array]:
    """Binds the primitive; returns the results of the table `Results`."""
    return OPERATOR.bind(dequant_rope_quant_kvcache_p, operands, options)


def _jvp(primals, tangents, **params):
    raise NotImplementedError(
        "dequant_rope_quant_kvcache is an inference operator and has no derivative: rounding to "
        "int8 has a zero gradient almost everywhere. Use jax.lax.stop_gradient on its inputs."
    )


ad.primitive_jvps[dequant_rope_quant_kvcache_p] = _jvp
