"""`python -m jax_kvcache info`: versions, devices, and which implementations run where."""

import argparse
import platform

import jax
import jaxlib
import numpy as np

import jax_kvcache
from jax_kvcache import _ascend, _ffi

PLATFORMS = ("cpu", "gpu", "tpu", "ascend")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser("info", help="versions, devices, available implementations")
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> None:
    """Prints it all."""
    print("versions")
    for name, version in (
        ("jax_kvcache", jax_kvcache.__version__),
        ("python", platform.python_version()),
        ("jax", jax.__version__),
        ("jaxlib", jaxlib.__version__),
        ("numpy", np.__version__),
    ):
        print(f"  {name:12} {version}")
    print("devices")
    for device in jax.devices():
        print(f"  {device.platform}:{device.id:<8} {device.device_kind}")
    print("native library")
    print(f"  {_ffi.library_path()}")
    print("implementations")
    print(f"  {'xla':12} available on every platform")
    for name in dict.fromkeys((*PLATFORMS, jax.default_backend())):
        reason = _ffi.unavailable(name)
        print(f"  {f'ffi, {name}':12} {f'not available: {reason}' if reason else 'available'}")
    print("ascend")
    for name, text in _ascend.report().items():
        print(f"  {name}: {text}")
