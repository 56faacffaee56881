"""Compiles the stand-in device from its sources, once per version of them."""

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-Wl,-rpath,$ORIGIN")

# Each library's sources, and the libraries that it needs.
_LIBRARIES = {
    "libascend_standin.so": (("ledger.cc", "device.cc", "trampoline.cc", "plugin.cc"), ()),
    "libnnopbase.so": (("libnnopbase.cc",), ("libascend_standin.so",)),
    "libascendcl.so": (("libascendcl.cc",), ("libascend_standin.so",)),
    "libopapi.so": (
        ("libopapi.cc", "dequant_rope_quant_kvcache.cc", "validation.cc"),
        ("libascend_standin.so", "libnnopbase.so"),
    ),
}


def source_folder() -> Path:
    """Where the sources are: in the wheel, or in the checkout."""
    here = Path(__file__).resolve().parent.parent
    for folder in (here / "_standin_src", here.parent / "ffi" / "standin"):
        if (folder / "plugin.cc").exists():
            return folder
    raise RuntimeError(
        "The stand-in device's sources are not installed: use a source checkout of jax_kvcache."
    )


def cpu_plugin() -> Path:
    """The shared library of XLA's CPU plugin."""
    try:
        spec = importlib.util.find_spec("xla_plugins.xla_cpu_pjrt")
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(
            "The stand-in device needs xla-cpu-pjrt (Linux x86-64): "
            'pip install "jax-kvcache[standin]".'
        )
    return Path(next(iter(spec.submodule_search_locations))) / "xla_cpu_pjrt.so"


def compiler() -> str:
    """The C++ compiler."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise RuntimeError("The stand-in device is compiled on first use: install g++, or set CXX.")
    return found


def _compile(folder: Path, cxx: str, sources: Path, include: list[Path]) -> None:
    for name, (files, needs) in _LIBRARIES.items():
        command = [*shlex.split(cxx), *_FLAGS, f"-I{sources}", f"-I{sources / 'include'}"]
        for path in include:
            command += ["-isystem", str(path)]
        command += [str(sources / file) for file in files]
        command += ["-o", str(folder / name), f"-Wl,-soname,{name}"]
        command += [str(folder / need) for need in needs] + ["-ldl", "-lpthread"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"Compiling the stand-in's {name} failed:\n{done.stderr}")


def build() -> Path:
    """Compiles the stand-in where that has not been done; a few seconds.

    Returns:
      The folder of a toolkit as CANN's: its libraries are in lib64, its headers in include.

    Raises:
      RuntimeError: no sources, no compiler, no xla-cpu-pjrt, or the compiler failed.
    """
    if not sys.platform.startswith("linux"):
        raise RuntimeError("The stand-in device runs on Linux x86-64.")
    sources, plugin, cxx = source_folder(), cpu_plugin(), compiler()
    include = [Path(jax.ffi.include_dir()), plugin.parent / "include"]
    digest = hashlib.sha256(f"{cxx} {_FLAGS} {include}".encode())
    for path in sorted(sources.rglob("*")):
        if path.suffix in (".cc", ".h"):
            digest.update(path.name.encode() + path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jax_kvcache"
    toolkit = cache / f"standin-{digest.hexdigest()[:16]}"
    if (toolkit / "lib64").exists():
        return toolkit
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder) / "toolkit"
        shutil.copytree(sources / "include", made / "include")
        (made / "lib64").mkdir()
        _compile(made / "lib64", cxx, sources, include)
        try:
            made.rename(toolkit)
        except OSError:  # another process was first
            if not (toolkit / "lib64").exists():
                raise
    return toolkit
