"""The stand-in Ascend device: develop and test the Ascend path on a Linux x86-64 machine.

It is XLA's CPU plugin behind the face of the public Ascend plugin, with stand-ins of CANN's
libraries that check each call and compute it. It refuses at least what the public plugin's runtime
and CANN refuse. It shows that calls, descriptors, lifetimes and order are right, and the bits of
the published kernel's arithmetic. It shows nothing about an NPU: ffi/ASCEND.md lists what only
hardware can show.
"""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import pkgutil
from typing import Any, Literal, NamedTuple

import jax

from jax_kvcache import _compat
from jax_kvcache.backends import pjrt
from jax_kvcache.testing import build

FUNCTIONS = (
    "aclCreateTensor",
    "aclDestroyTensor",
    "aclCreateIntArray",
    "aclDestroyIntArray",
    "aclSetAclOpExecutorRepeatable",
    "aclDestroyAclOpExecutor",
    "aclnnDequantRopeQuantKvcacheGetWorkspaceSize",
    "aclnnDequantRopeQuantKvcache",
    "aclGetRecentErrMsg",
)
"""What of CANN the handler calls, and a test can make fail."""


class Standin:
    """The stand-in device's memory of what was asked of it, and its controls."""

    def __init__(self, toolkit):
        """Loads the device's own library from its toolkit."""
        self.toolkit = toolkit
        self._lib = ctypes.CDLL(str(toolkit / build.DEVICE))
        self._lib.standin_load.restype = ctypes.c_char_p
        self._lib.standin_register.restype = ctypes.c_char_p
        self._lib.standin_register.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
        self._lib.standin_ledger.restype = ctypes.c_void_p
        self._lib.standin_free.argtypes = [ctypes.c_void_p]
        self._lib.standin_inject.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_int32]

    @property
    def library_path(self) -> str:
        """The PJRT plugin."""
        return self._lib._name

    def load_cann(self, release: str) -> None:
        """Loads a stand-in CANN, as a real plugin loads CANN: the loader then knows its names."""
        folder = self.toolkit / release
        for name in ("libnnopbase.so", "libascendcl.so", "libopapi.so"):
            if f"lib64/{name}" in build.RELEASES[release]:
                ctypes.CDLL(str(folder / "lib64" / name))
        os.environ["ASCEND_HOME_PATH"] = str(folder)
        if (folder / "opp").exists():
            os.environ["ASCEND_OPP_PATH"] = str(folder / "opp")

    def load_plugin(self, machine: "Machine") -> None:
        """Loads XLA's CPU plugin behind the stand-in."""
        error = self._lib.standin_load(
            str(build.cpu_plugin()).encode(),
            machine.platform_name.encode(),
            int(machine.pjrt_extension),
            int(machine.ffi == "newest"),
        )
        if error is not None:
            raise RuntimeError(f"The stand-in cannot use xla-cpu-pjrt: {error.decode()}.")

    def hook_jax(self, hook: str) -> None:
        """Registers a hook of `jax.ffi`, as a plugin's start-up does.

        The public plugin's takes one argument, where JAX gives five. JAX calls it with the targets
        in its queue, but has recorded it by then and leaves them there, and the start-up ignores
        the exception.
        """
        if hook == "none":
            return
        taking = {"works": self.register_target, "one_argument": lambda target: None}[hook]
        for name in ("ascend", "ASCEND"):
            with contextlib.suppress(TypeError):
                _compat.register_custom_call_handler(name, taking)

    def register_target(self, name, fn, platform, api_version=1, traits=0) -> None:
        """Registers an FFI target, as `jax.ffi.register_ffi_target` asks of a plugin's hook."""
        handler = fn["execute"] if isinstance(fn, dict) else fn
        name = name if isinstance(name, bytes) else name.encode()
        error = self._lib.standin_register(name, pjrt.capsule_pointer(handler))
        if error is not None:
            raise RuntimeError(error.decode())

    def ledger(self) -> dict[str, Any]:
        """What happened since `reset`.

        Returns:
          counts: calls by function, and of "handler" and "launched"; "tensor created" and so on;
            "handler nanoseconds": in handlers, without the runtime's functions that they call.
          alive: how many tensors, int_arrays, executors and scratch blocks exist now.
          pending: injected failures that have not happened yet.
          faults: what no correct caller does: a double destroy, a slot past the cache, ...
          events: "launch 0 on 3", "return 0", "execute 0", in the order that they happened.
          descriptors: what the operator's last call received, or None.
        """
        text = self._lib.standin_ledger()
        try:
            return json.loads(ctypes.string_at(text).decode())
        finally:
            self._lib.standin_free(text)

    @property
    def launches(self) -> int:
        """How many calls the operator accepted since `reset`."""
        return self.ledger()["counts"].get("launched", 0)

    def reset(self) -> None:
        """Forgets everything but the objects that are alive."""
        self._lib.standin_reset()

    def fail(self, function: str, *, status: int = 561000, skip: int = 0) -> None:
        """Makes one call fail.

        Args:
          function: one of `FUNCTIONS`, or "scratch" for the workspace.
          status: the aclnn status; functions that return a pointer return null.
          skip: how many calls of it succeed first.
        """
        if function not in (*FUNCTIONS, "scratch"):
            raise ValueError(
                f"`function` must be one of {FUNCTIONS} or 'scratch', got {function!r}."
            )
        self._lib.standin_inject(function.encode(), skip, status)


class Machine(NamedTuple):
    """What a stand-in stands for: the arguments of `enable_ascend_standin`."""

    devices: int
    platform_name: str
    jax_hook: str
    pjrt_extension: bool
    ffi: str
    cann: str | None

    def check(self) -> None:
        """Raises ValueError for what there is no stand-in of."""
        if self.devices < 1:
            raise ValueError(f"`devices` must be 1 or more, got {self.devices}.")
        for name, known in (
            ("platform_name", ("ASCEND", "ascend")),
            ("jax_hook", ("one_argument", "works", "none")),
            ("ffi", ("0.2", "newest")),
            ("cann", (*build.RELEASES, None)),
        ):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"`{name}` must be one of {known}, got {value!r}.")


_enabled: tuple[Standin, Machine] | None = None


def _chosen_platforms() -> str | None:
    return getattr(jax.config, "jax_platforms", None)


def _check_free() -> None:
    if _compat.backends_are_initialized():
        raise RuntimeError(
            "JAX has already started its backends: call `enable_ascend_standin` before the first "
            "computation and before `jax.devices()`."
        )
    entry_points = importlib.metadata.entry_points(group="jax_plugins")
    names = {entry_point.name for entry_point in entry_points}
    if spec := importlib.util.find_spec("jax_plugins"):
        names |= {m.name for m in pkgutil.iter_modules(spec.submodule_search_locations)}
    if any("ascend" in name.lower() for name in names) or _compat.plugin_api("ascend"):
        raise RuntimeError("An Ascend plugin is installed: the stand-in does not replace it.")
    chosen = _chosen_platforms()
    if chosen and "ascend" not in chosen.split(","):
        raise RuntimeError(
            f"JAX_PLATFORMS={chosen} leaves the stand-in out: unset it, or add ascend to it."
        )


def enable_ascend_standin(
    *,
    devices: int = 1,
    platform_name: Literal["ASCEND", "ascend"] = "ASCEND",
    jax_hook: Literal["one_argument", "works", "none"] = "one_argument",
    pjrt_extension: bool = True,
    ffi: Literal["0.2", "newest"] = "0.2",
    cann: Literal["8.0", "8.5", "vendor", "early", "idle"] | None = "8.0",
) -> Standin:
    """Makes a stand-in Ascend device JAX's default backend in this process.

    Compiles the stand-in on first use (with g++, a few seconds). Sets this process's
    ASCEND_HOME_PATH and forgets its other paths of CANN. The defaults are what the public plugin
    does.

    Args:
      devices: how many devices it has.
      platform_name: what its client calls itself.
      jax_hook: how its hook of `jax.ffi` takes FFI targets: not at all, because it has one
        parameter too few for JAX's call, "works", or there is no hook.
      pjrt_extension: whether it takes them through its PJRT FFI extension, which reports success
        also for a handler that the runtime refuses.
      ffi: the version of the runtime's FFI: 0.2, which refuses handlers that report a newer one, or
        that of the installed jaxlib.
      cann: the release of CANN whose files are there: "early" has no functions that destroy an
        executor, "8.5" has the operator in a library of its own, "vendor" in the package of a
        vendor; the functions of "idle" do nothing, for timing what calls them. Without CANN (None)
        the operator cannot run.

    Returns:
      The device's memory and controls. A second call with the same arguments returns the first's.

    Raises:
      RuntimeError: JAX has started, a real Ascend plugin is installed, JAX_PLATFORMS leaves it out,
        it was enabled with other arguments, or it cannot be built.
      ValueError: an unknown name, or fewer than one device.
    """
    global _enabled
    machine = Machine(devices, platform_name, jax_hook, pjrt_extension, ffi, cann)
    machine.check()
    if _enabled is not None:
        if _enabled[1] != machine:
            raise RuntimeError(
                f"The stand-in is enabled with other arguments in this process: {_enabled[1]}."
            )
        return _enabled[0]
    _check_free()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # the plugin below is talkative
    standin = Standin(build.build())
    standin.load_plugin(machine)
    for variable in (
        "ASCEND_HOME_PATH",
        "ASCEND_TOOLKIT_HOME",
        "ASCEND_OPP_PATH",
        "ASCEND_CUSTOM_OPP_PATH",
    ):
        os.environ.pop(variable, None)
    if cann is not None:
        standin.load_cann(cann)
    _compat.register_plugin("ascend", standin.library_path, {"cpu_device_count": devices})
    standin.hook_jax(jax_hook)
    _enabled = (standin, machine)
    return standin
