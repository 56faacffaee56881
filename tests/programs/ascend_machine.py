"""One call of the operator where the stand-in device lacks something; prints what happened.

Argument: what `enable_ascend_standin` is given, in JSON.
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
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    jax.block_until_ready(jax.jit(jax_kvcache.dequant_rope_quant_kvcache)(**call))
found = {
    "explain": jax_kvcache.explain(**call),
    "launches": standin.launches,
    "warnings": [str(w.message) for w in caught],
    "report": ascend.report(),
}
print(json.dumps(found))
