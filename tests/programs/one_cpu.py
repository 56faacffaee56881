"""Runs the native kernel's large calls in a process that may use one CPU only."""

import os

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

from support import variants  # noqa: E402
from support.internals import library  # noqa: E402

assert library.worth_threads(1 << 30) == 1
variants.check_large()
print("same bits")
