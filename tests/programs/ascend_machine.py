"""Calls of the operator where the stand-in device lacks something; prints what happened.

Arguments: what `enable_ascend_standin` is given, in JSON; functions that are to fail, one a call,
before the last call.
"""

import json
import sys
import warnings

from jax_kvcache import testing

standin = testing.enable_ascend_standin(**json.loads(sys.argv[1]))

import jax  # noqa: E402
from support import calls  # noqa: E402
from support.internals import ascend  # noqa: E402

import jax_kvcache  # noqa: E402

call = calls.ones()
step = jax.jit(jax_kvcache.dequant_rope_quant_kvcache)
errors = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for function in sys.argv[2:]:
        standin.fail(function)
        try:
            jax.block_until_ready(step(**call))
        except (jax.errors.JaxRuntimeError, ValueError) as error:  # jit's fast path: the second
            errors.append(str(error))
    jax.block_until_ready(step(**call))
ledger = standin.ledger()
found = {
    "explain": jax_kvcache.explain(**call),
    "launches": standin.launches,
    "warnings": [str(w.message) for w in caught],
    "errors": errors,
    "alive": ledger["alive"],
    "faults": ledger["faults"],
    "report": ascend.report(),
}
print(json.dumps(found))
