"""The implementations that this process can run on CPU."""

from jax_kvcache import _ffi

NAMES = ["xla"] + (["ffi"] if _ffi.unavailable("cpu") is None else [])
