"""The device of a session of tests/ascend/on_device: the stand-in, started here, or a real one.

The environment variable ASCEND_SESSION says which: "device", or the stand-in's platform name and
the routes through which it takes FFI targets, for example "ASCEND pjrt". Outside a session it is
not set. Importing this module starts the stand-in, so it comes before anything that starts JAX.
"""

import os

from jax_kvcache import testing

SESSION = os.environ.get("ASCEND_SESSION", "")
ON_HARDWARE = SESSION == "device"
NAME, *ROUTES = SESSION.split() or [""]
STANDIN = None
if SESSION and not ON_HARDWARE:
    STANDIN = testing.enable_ascend_standin(devices=8, platform_name=NAME, routes=ROUTES)
