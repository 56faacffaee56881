"""Registers the FFI targets with the Ascend PJRT plugin, and finds out whether it took them."""

import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jax_kvcache import _compat
from jax_kvcache.backends import library, pjrt
from jax_kvcache.backends.backend import Backend

PLATFORMS = ("ascend", "ASCEND")
"""The public plugin registers as the first, and its client reports the second as its platform.

JAX looks lowering rules and FFI targets up by either name, so both are registered.
"""


@dataclasses.dataclass
class _Offers:
    """What came of offering the targets: for each way None if it was accepted, or why not."""

    through_jax: str | None = "it was not tried"
    through_pjrt: str | None = "no Ascend PJRT plugin was found in this process"
    targets: tuple[str, ...] = ()


_offers = _Offers()


def register(backend: Backend) -> None:
    """Offers the targets to the Ascend plugin in both ways, now or when JAX discovers it.

    The public plugin's hook of `jax.ffi` has one parameter too few, so that the PJRT FFI extension
    is the way that works there.
    """
    _offers.targets = tuple(backend.targets)
    capsules = {
        name: jax.ffi.pycapsule(library.symbol(target.symbol))
        for name, target in backend.targets.items()
    }
    try:
        for name, capsule in capsules.items():
            for platform in backend.registered_as:
                jax.ffi.register_ffi_target(name, capsule, platform=platform)
        _offers.through_jax = None
    except Exception as error:  # whatever the plugin's hook raises
        _offers.through_jax = f"the plugin's hook raised {type(error).__name__}: {error}"

    def with_plugin(c_api):
        if not any(c_api is _compat.plugin_api(name) for name in PLATFORMS):
            return
        for name, capsule in capsules.items():
            handler = pjrt.capsule_pointer(capsule)
            errors = [pjrt.register_handler(c_api, name, handler, p) for p in PLATFORMS]
            _offers.through_pjrt = None if None in errors else errors[0]

    _compat.on_plugins_discovered(with_plugin)


def _through_jax() -> str | None:
    if _offers.through_jax is not None:
        return _offers.through_jax
    hooked = [p for p in PLATFORMS if _compat.has_custom_call_handler(p)]
    if not hooked:
        return "no plugin takes targets from jax.ffi"
    # JAX records a hook before it gives it the targets of its queue, and keeps them if it raises.
    if all(set(_offers.targets) & _compat.queued_ffi_targets(p) for p in hooked):
        return "the plugin's hook did not take the target from JAX's queue"
    return None


def offers() -> dict[str, str | None]:
    """The ways to register: for each None where the plugin accepted the target, or why it did not.

    Accepted is not registered: a plugin's FFI extension may report success for a handler that its
    runtime refuses. `refusal` knows.
    """
    return {"jax.ffi": _through_jax(), "PJRT FFI extension": _offers.through_pjrt}


def name() -> str | None:
    """The platform name of this process's Ascend plugin; None without one, or before JAX starts."""
    return next((p for p in _compat.initialized_backends().values() if p in PLATFORMS), None)


@functools.cache
def _compile(target: str) -> str | None:
    """Why a program that calls the target does not compile, or None; compiles once a process.

    A thread of its own has none of the caller's contexts: its mesh, its device, its precision.
    """
    reason: list[str] = []

    def work():
        try:
            plugin = next(k for k, v in _compat.initialized_backends().items() if v in PLATFORMS)
            device = jax.local_devices(backend=plugin)[0]
            byte = jax.ShapeDtypeStruct((1,), jnp.int8, sharding=SingleDeviceSharding(device))
            jax.jit(jax.ffi.ffi_call(target, byte)).lower(byte).compile()
        except Exception as error:  # whatever the plugin's compiler raises
            reason.append(str(error).split("\n")[0])

    thread = threading.Thread(target=work, name="jax_kvcache: is the target registered?")
    thread.start()
    thread.join()
    return reason[0] if reason else None


def refusal() -> str | None:
    """Why a target is not registered with this process's plugin, or None when all are.

    The only proof of a registration is a program with the target that compiles.
    """
    for target in _offers.targets:
        if (reason := _compile(target)) is not None:
            tried = "; ".join(f"{way}: {why or 'accepted'}" for way, why in offers().items())
            return f"the Ascend plugin did not take the FFI target ({tried}; compiling: {reason})"
    return None
