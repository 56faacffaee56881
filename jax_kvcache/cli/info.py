"""`python -m jax_kvcache info`: versions, devices, and which implementations run where."""

import argparse
import platform

import jax
import jaxlib
import numpy as np

from jax_kvcache.backends import BACKENDS, find, library
from jax_kvcache.version import __version__

OPERATORS = ("dequant_rope_quant_kvcache", "decode_attention")
_OTHER_PLATFORMS = ("tpu",)  # JAX has them, and the reference runs there


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser("info", help="versions, devices, available implementations")
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> None:
    """Prints it all."""
    print("versions")
    for name, version in (
        ("jax_kvcache", __version__),
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
    print(f"  {library.path()}")
    for operator in OPERATORS:
        print(operator)
        print(f"  {'xla':12} available on every platform")
        for name, state in support(operator).items():
            print(f"  {f'ffi, {name}':12} {state}")
    for backend in BACKENDS:
        if report := backend.report():
            print(backend.name)
            for name, text in report.items():
                print(f"  {name}: {text}")


def support(operator: str) -> dict[str, str]:
    """What the backends' records say of an operator's native target, by platform."""
    known = [backend.reported_as[0] for backend in BACKENDS]
    platforms = dict.fromkeys((*known, *_OTHER_PLATFORMS, jax.default_backend()))
    return {name: _state(operator, name) for name in platforms}


def _state(operator: str, name: str) -> str:
    backend = find(name)
    if backend is None or operator not in backend.targets:
        return f"not available: there is no native target for platform '{name}'"
    if reason := backend.unavailable():
        return f"not available: {reason}"
    return "available"
