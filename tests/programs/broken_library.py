"""Runs the operator where the native library is missing, stale or too new; prints what happened.

Argument: "missing", "stale" or "newer".
"""

import ctypes
import sys
import tempfile
import warnings
from pathlib import Path

import jax

real_library = ctypes.CDLL


class MissingLibrary(ctypes.CDLL):
    def __init__(self, name, *args):
        raise OSError(f"{name}: no such file")


class StaleLibrary(ctypes.CDLL):
    def __init__(self, name, *args):
        super().__init__("libm.so.6", *args)


if sys.argv[1] == "missing":
    ctypes.CDLL = MissingLibrary
elif sys.argv[1] == "stale":
    ctypes.CDLL = StaleLibrary
else:  # the running jaxlib claims to be older than the library
    header = Path(tempfile.mkdtemp(), "xla", "ffi", "api", "c_api.h")
    header.parent.mkdir(parents=True)
    header.write_text("#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 1\n")
    jax.ffi.include_dir = lambda: str(header.parents[3])

import jax.numpy as jnp  # noqa: E402
from support import calls  # noqa: E402

import jax_kvcache  # noqa: E402
import jax_kvcache.__main__  # noqa: E402

ctypes.CDLL = real_library
print("zeros:", jnp.zeros(1))
warnings.simplefilter("default")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("default")
    for D in (64, 32, 16):  # lowered three times
        result = jax_kvcache.dequant_rope_quant_kvcache(**calls.ones(D=D))
print("ran:", result.q.shape)
print("warnings:", len(caught), caught[0].message)
try:
    jax_kvcache.dequant_rope_quant_kvcache(**calls.ones(), implementation="ffi")
except NotImplementedError as error:
    print("refused:", error)
print("explained:", jax_kvcache.explain(**calls.arguments()))
jax_kvcache.__main__.main(["info"])
