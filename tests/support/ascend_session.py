"""The device of a session of tests/ascend/on_device: the stand-in, started here, or a real one.

The environment variable ASCEND_SESSION says which: "device", or in JSON what
`enable_ascend_standin` is given. Outside a session it is not set. Importing this module starts the
stand-in, so it comes before anything that starts JAX.
"""

import json
import os

from jax_kvcache import testing

SESSION = os.environ.get("ASCEND_SESSION", "")
ON_HARDWARE = SESSION == "device"
ARGUMENTS, STANDIN = {}, None
if SESSION and not ON_HARDWARE:
    ARGUMENTS = json.loads(SESSION)
    STANDIN = testing.enable_ascend_standin(**ARGUMENTS)
