"""Runs every step of support/automatic.py over four devices and compares it with one device."""

import jax
import numpy as np

jax.config.update("jax_num_cpu_devices", 4)

from support import automatic  # noqa: E402

for name, step in automatic.STEPS.items():
    expected = jax.jit(automatic.decode)(*automatic.arguments(step))
    out, cache = automatic.over_devices(step)(*automatic.placed(step))
    for got, want in zip(jax.tree.leaves(cache), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_array_equal(got, want, err_msg=name)
    attended = [np.asarray(a, np.float32) for a in (out, expected[0])]
    np.testing.assert_allclose(*attended, rtol=2**-7, atol=1e-3, err_msg=name)  # bfloat16
    print(name, flush=True)
