"""Runs the native kernel's large calls in a process that may use one CPU only."""

import os

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

from support import variants  # noqa: E402

from jax_kvcache import _ffi  # noqa: E402

assert _ffi.worth_threads(1 << 30) == 1
variants.check_large()
print("same bits")
