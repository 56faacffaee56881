"""Which implementation of an operator runs: the choice, its reason, and what options carry it."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax

from jax_kvcache import backends
from jax_kvcache.ops.checks import check_choice

Implementation = Literal["ffi", "xla"] | None


@dataclasses.dataclass(frozen=True)
class Options:
    """The static parameters that every operator's primitive has.

    Attributes:
      implementation: None, "ffi" or "xla"; see `Choice`.
    """

    implementation: Implementation

    def attributes(self) -> dict[str, Any]:
        """What the native target takes beside its operands."""
        return {}


def check_implementation(implementation: Any) -> None:
    """Raises ValueError unless it is an `Implementation`."""
    check_choice("implementation", implementation, (None, "ffi", "xla"))


class Choice(NamedTuple):
    """What one platform runs.

    Attributes:
      native: whether it is the native target.
      reason: why it is not, or None.
      surprising: whether the user should be told: the platform's native target was expected to run.
    """

    native: bool
    reason: str | None
    surprising: bool


def choose(operator: str, platform: str, operands: Any, asked: Implementation) -> Choice:
    """Decides what a platform runs; initialises no backend.

    `None` takes the native target where there is one that can run the call, "ffi" demands it, "xla"
    is the reference anywhere. A target may say of a call that the reference is to be preferred.

    Args:
      operator: the operator's name.
      platform: the platform that is lowered, as JAX spells it there, for example "cpu".
      operands: the primitive's operands, or their types.
      asked: the user's `implementation`.
    """
    if asked == "xla":
        return Choice(False, "asked for", False)
    backend = backends.find(platform)
    if backend is None or operator not in backend.targets:
        return Choice(False, f"there is no native target for platform '{platform}'", False)
    target = backend.targets[operator]
    if asked is None and (preference := target.prefers_reference(operands)):
        return Choice(False, preference, False)
    reason = target.refusal(operands)
    if reason is None and (backend.is_here() or not backend.lowers_elsewhere):
        reason = backend.unavailable()
    return Choice(reason is None, reason, reason is not None)


class Explanation(NamedTuple):
    """What a call would run.

    `implementation` is "ffi" or "xla", or None when the call would raise.
    """

    platform: str
    implementation: str | None
    reason: str

    def __str__(self) -> str:
        """One line for people."""
        runs = self.implementation or "nothing (it raises NotImplementedError)"
        return f"{self.platform}: {runs}: {self.reason}"


def explain_choice(
    operator: str, platform: str | None, operands: Any, asked: Implementation
) -> Explanation:
    """What `choose` decides, in words.

    Args:
      operator: the operator's name.
      platform: the platform to answer for; None is JAX's default backend.
      operands: the types of the primitive's operands.
      asked: the user's `implementation`.

    Raises:
      TypeError: `platform` is not a str.
    """
    if platform is not None and not isinstance(platform, str):
        raise TypeError(f"`platform` must be a str, got {platform!r}.")
    platform = jax.default_backend() if platform is None else platform
    choice = choose(operator, platform, operands, asked)
    if not choice.native:
        runs = None if asked == "ffi" else "xla"
        return Explanation(platform, runs, str(choice.reason))
    reason = f"the native target '{operator}' takes this call"
    backend = backends.find(platform)
    if backend is not None and (missing := backend.unavailable()):
        reason += f" when it is lowered for another machine ({missing})"
    return Explanation(platform, "ffi", reason)
