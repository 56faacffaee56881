"""Tests that need an NVIDIA GPU; without one every test here is skipped.

`ffi/CUDA.md` has the commands.
"""

import jax
import pytest


@pytest.fixture(autouse=True)
def gpu():
    """The GPU that JAX started on."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        pytest.skip(f"no NVIDIA GPU: JAX started on {device.platform}")
    return device
