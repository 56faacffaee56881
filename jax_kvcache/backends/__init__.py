"""The backends: one record each. Adding one is adding its module, its record here, its kernels.

Importing this registers the native library's FFI targets; it initialises no JAX backend.
"""

from jax_kvcache import _compat
from jax_kvcache.backends import library
from jax_kvcache.backends.ascend import ASCEND
from jax_kvcache.backends.backend import Backend as Backend
from jax_kvcache.backends.backend import Target as Target
from jax_kvcache.backends.cpu import CPU
from jax_kvcache.backends.cuda import CUDA

BACKENDS: tuple[Backend, ...] = (CPU, CUDA, ASCEND)

# The platforms that have a rule of their own when an operator is lowered.
PLATFORMS: tuple[str, ...] = tuple(name for backend in BACKENDS for name in backend.lowered_as)


def find(platform: str) -> Backend | None:
    """The backend of a platform, under any of the names that JAX has for it; None without one.

    JAX reports an AMD GPU as "gpu" too; in a process with one and no NVIDIA GPU, "gpu" has none.
    """
    if platform == "gpu" and "rocm" in _compat.initialized_backends() and not CUDA.is_here():
        return None
    for backend in BACKENDS:
        if platform in (*backend.lowered_as, *backend.reported_as):
            return backend
    return None


def unavailable(platform: str, operator: str) -> str | None:
    """Why an operator's native target cannot run on a platform in this process, or None."""
    backend = find(platform)
    if backend is None or operator not in backend.targets:
        return f"there is no native target for platform '{platform}'"
    return backend.unavailable()


for _backend in BACKENDS:
    if library.load().handle is not None:
        _backend.register(_backend)
