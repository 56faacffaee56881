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
from typing import NamedTuple

import jax

DEVICE = "libascend_standin.so"
"""The library of the device itself, which is the PJRT plugin too."""

_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-Wl,-rpath,$ORIGIN")
_EARLY_BASE = "libnnopbase_without_executor_functions.so"


class _Library(NamedTuple):
    """What a library is compiled from, the libraries that it needs, and its name for the loader."""

    files: tuple[str, ...]
    needs: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    soname: str | None = None


_LIBRARIES = {
    DEVICE: _Library(("ledger.cc", "device.cc", "trampoline.cc", "plugin.cc")),
    "libnnopbase.so": _Library(("libnnopbase.cc",), (DEVICE,)),
    _EARLY_BASE: _Library(
        ("libnnopbase.cc",), (DEVICE,), ("-DSTANDIN_WITHOUT_EXECUTOR_FUNCTIONS",), "libnnopbase.so"
    ),
    "libascendcl.so": _Library(("libascendcl.cc",), (DEVICE,)),
    "libopapi.so": _Library(
        ("libopapi.cc", "dequant_rope_quant_kvcache.cc", "validation.cc"),
        (DEVICE, "libnnopbase.so"),
    ),
    "libopapi_idle.so": _Library(("idle.cc",), soname="libopapi.so"),
}
_BASE = {"lib64/libnnopbase.so": "libnnopbase.so", "lib64/libascendcl.so": "libascendcl.so"}

RELEASES = {
    "8.0": _BASE | {"lib64/libopapi.so": "libopapi.so"},
    "8.5": _BASE | {"lib64/libopapi_transformer.so": "libopapi.so"},
    "vendor": _BASE | {"opp/vendors/customize/op_api/lib/libcust_opapi.so": "libopapi.so"},
    "early": {
        "lib64/libnnopbase.so": _EARLY_BASE,
        "lib64/libascendcl.so": "libascendcl.so",
        "lib64/libopapi.so": "libopapi.so",
    },
    "idle": {"lib64/libopapi.so": "libopapi_idle.so"},
}
"""Toolkits by name, each as where its libraries are: as in CANN 8.0 and 8.5, with the operator in a
vendor's package, as before 8.0, without the two functions that destroy an executor, and one whose
functions do nothing, for timing what calls them."""


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
    for name, library in _LIBRARIES.items():
        command = [*shlex.split(cxx), *_FLAGS, *library.flags]
        command += [f"-I{sources}", f"-I{sources / 'include'}"]
        for path in include:
            command += ["-isystem", str(path)]
        command += [str(sources / file) for file in library.files]
        command += ["-o", str(folder / name), f"-Wl,-soname,{library.soname or name}"]
        command += [str(folder / need) for need in library.needs] + ["-ldl", "-lpthread"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"Compiling the stand-in's {name} failed:\n{done.stderr}")


def _lay_out(toolkit: Path) -> None:
    """Makes the folders of every release, with links to the compiled libraries."""
    for release, places in RELEASES.items():
        for place, library in places.items():
            path = toolkit / release / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(os.path.relpath(toolkit / library, path.parent))
    priority = toolkit / "vendor" / "opp" / "vendors" / "config.ini"
    priority.write_text("load_priority=not_installed,customize\n")


def build() -> Path:
    """Compiles the stand-in where that has not been done; a few seconds.

    Returns:
      The folder of the libraries, in which each of `RELEASES` has a folder laid out as CANN's.

    Raises:
      RuntimeError: no sources, no compiler, no xla-cpu-pjrt, or the compiler failed.
    """
    if not sys.platform.startswith("linux"):
        raise RuntimeError("The stand-in device runs on Linux x86-64.")
    sources, plugin, cxx = source_folder(), cpu_plugin(), compiler()
    include = [Path(jax.ffi.include_dir()), plugin.parent / "include"]
    digest = hashlib.sha256(f"{cxx} {_FLAGS} {include} {_LIBRARIES} {RELEASES}".encode())
    for path in sorted(sources.rglob("*")):
        if path.suffix in (".cc", ".h"):
            digest.update(path.name.encode() + path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jax_kvcache"
    toolkit = cache / f"standin-{digest.hexdigest()[:16]}"
    if toolkit.exists():
        return toolkit
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder) / "toolkit"
        made.mkdir()
        _compile(made, cxx, sources, include)
        _lay_out(made)
        try:
            made.rename(toolkit)
        except OSError:  # another process was first
            if not toolkit.exists():
                raise
    return toolkit
