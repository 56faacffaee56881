"""The record of one backend: what it is called, what it runs, what it refuses and why."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jax_kvcache.backends import library


def _no_reason(operands: Any) -> str | None:
    del operands
    return None


def _as_they_are(operands: Any) -> Any:
    return operands


def _no_scratch(operands: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    del operands
    return ()


@dataclasses.dataclass(frozen=True)
class Target:
    """One operator's native target on one backend.

    Attributes:
      symbol: the handler's name in the native library.
      refusal: why it does not take a call with these operands (or their types), or None.
      prepare: the operands as the target takes them.
      prefers_reference: why `implementation=None` does not take it for a call that it could take,
        for example that the reference is faster, or None when there is no reason.
      scratch: the arrays that it takes as further results, for its own use.
    """

    symbol: str
    refusal: Callable[[Any], str | None] = _no_reason
    prepare: Callable[[Any], Any] = _as_they_are
    prefers_reference: Callable[[Any], str | None] = _no_reason
    scratch: Callable[[Any], tuple[jax.ShapeDtypeStruct, ...]] = _no_scratch


def register_with_jax(backend: "Backend") -> None:
    """Registers a backend's targets through `jax.ffi`."""
    for name, target in backend.targets.items():
        handler = jax.ffi.pycapsule(library.symbol(target.symbol))
        for platform in backend.registered_as:
            jax.ffi.register_ffi_target(name, handler, platform=platform)


@dataclasses.dataclass(frozen=True)
class Backend:
    """One backend. JAX spells a platform differently in different places.

    Attributes:
      name: the name of its folder in `ffi/`.
      lowered_as: the names under which rules are lowered, also by `jax.lax.platform_dependent`.
      registered_as: the names under which FFI targets are registered.
      reported_as: the names that JAX's devices and `jax.default_backend` report.
      targets: its target of each operator.
      unavailable: why its targets cannot run in this process, or None when they can.
      is_here: whether this process has such a device.
      lowers_elsewhere: whether a process without such a device may lower a call for one.
      register: registers the targets; called once, if the native library is there.
      report: what people should see of its state.
    """

    name: str
    lowered_as: tuple[str, ...]
    registered_as: tuple[str, ...]
    reported_as: tuple[str, ...]
    targets: Mapping[str, Target]
    unavailable: Callable[[], str | None]
    is_here: Callable[[], bool]
    lowers_elsewhere: bool
    register: Callable[["Backend"], None] = register_with_jax
    report: Callable[[], dict[str, str]] = dict
