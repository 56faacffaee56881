"""What a model's configuration says about RoPE: its frequencies and the factor of its tables."""

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_kvcache.ops.checks import check_int
from jax_kvcache.rope_frequencies import FORMULAS

DEFAULT_THETA = 10000.0
# Each type's own keys: those that it needs, then those that it may have.
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("factor", "attention_factor"),
    ),
}
_COMMON_KEYS = (
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "max_position_embeddings",
)
_NEED_LENGTH = ("dynamic", "longrope")  # their frequencies depend on the text's length


@dataclasses.dataclass(frozen=True)
class RopeParameters:
    """A configuration's RoPE, checked; hashable, so that it can be static under jit.

    Attributes:
      type: a key of the table of types.
      theta: the base of the frequencies.
      partial_rotary_factor: share of a head's dimensions that turn, in (0, 1].
      values: the type's own parameters, in sorted order; lists are tuples.
    """

    type: str = "default"
    theta: float = DEFAULT_THETA
    partial_rotary_factor: float = 1.0
    values: tuple[tuple[str, Any], ...] = ()

    @property
    def needs_length(self) -> bool:
        """Whether the frequencies depend on `seq_len`."""
        return self.type in _NEED_LENGTH

    def rotary_dim(self, head_dim: int) -> int:
        """How many of a head's dimensions turn.

        Raises:
          ValueError: it is not an even number above 0.
        """
        dim = int(head_dim * self.partial_rotary_factor)
        if dim <= 0 or dim % 2 or (head_dim - dim) % 2:
            raise ValueError(
                "`partial_rotary_factor` must leave an even number of dimensions above 0, got "
                f"{self.partial_rotary_factor} of `head_dim` = {head_dim}."
            )
        return dim

    def frequencies(self, head_dim: int, seq_len: int | None = None) -> tuple[np.ndarray, float]:
        """The angles per position, and what cos and sin are multiplied by.

        Args:
          head_dim: D.
          seq_len: the longest sequence, for the types "dynamic" and "longrope".

        Returns:
          [r/2] float64 radians per position, r = `rotary_dim(head_dim)`; and the factor.

        Raises:
          TypeError: `seq_len` is not an int.
          ValueError: `seq_len` is missing or below 1, or a frequency is not finite.
        """
        length = None if seq_len is None else check_int("seq_len", seq_len)
        if self.needs_length and (length is None or length < 1):
            raise ValueError(
                f'`seq_len` must be an int above 0 for rope_type "{self.type}", whose frequencies '
                f"depend on it, got {seq_len}; give the longest sequence that will be read."
            )
        values, dim = dict(self.values), self.rotary_dim(head_dim)
        try:
            with np.errstate(all="ignore"):
                frequencies, factor = FORMULAS[self.type](values, self.theta, dim, length)
        except ArithmeticError:  # a base of 1, or a length of 1, whose logarithm is a divisor
            frequencies, factor = np.full(dim // 2, np.nan), 1.0
        if not np.isfinite(frequencies).all() or not math.isfinite(factor):
            raise ValueError(
                f'`rope_parameters` of rope_type "{self.type}" must give finite frequencies, and '
                f'do not for "rope_theta" = {self.theta}, {dim} rotary dimensions and {values}.'
            )
        return frequencies, factor


def read_rope_parameters(
    parameters: Mapping[str, Any] | RopeParameters | None, theta: float | None = None
) -> RopeParameters:
    """Checks a configuration's `rope_parameters`, or an older one's `rope_scaling`.

    Args:
      parameters: keys as transformers writes them; `rope_type` may be called `type`. The type
        "dynamic" takes the trained length from `original_max_position_embeddings` or, failing
        that, `max_position_embeddings`. Keys that are null count as absent.
      theta: the base, where `parameters` has no `rope_theta`.

    Raises:
      TypeError: `parameters` is not a mapping, or a value has the wrong type.
      ValueError: an unknown type or key, a missing or impossible value, or two bases.
    """
    if isinstance(parameters, RopeParameters):
        if theta is not None:
            raise ValueError(_two_bases(theta, parameters.theta))
        return parameters
    if parameters is not None and not isinstance(parameters, Mapping):
        raise TypeError(f"`rope_parameters` must be a dict, got {type(parameters).__name__}.")
    given = {key: value for key, value in (parameters or {}).items() if value is not None}
    kind = _type_of(given)
    needed, optional = _KEYS[kind]
    for key in given:
        if key not in (*_COMMON_KEYS, *needed, *optional):
            raise ValueError(
                f'`rope_parameters` has the key "{key}", which rope_type "{kind}" does not define; '
                f"known are {', '.join((*_COMMON_KEYS, *needed, *optional))}."
            )
    for key in needed:
        if key not in given:
            raise ValueError(f'`rope_parameters` must have "{key}" for rope_type "{kind}".')
    if theta is not None and "rope_theta" in given:
        raise ValueError(_two_bases(theta, given["rope_theta"]))
    for key, value in given.items():
        _check_value(key, value)
    if kind in _NEED_LENGTH:
        _check_length_keys(kind, given)
    own = {
        key: tuple(map(float, value)) if isinstance(value, list | tuple) else value
        for key, value in given.items()
        if key not in ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    }
    base = given.get("rope_theta", DEFAULT_THETA if theta is None else theta)
    share = float(given.get("partial_rotary_factor", 1.0))
    return RopeParameters(kind, float(base), share, tuple(sorted(own.items())))


def _two_bases(theta: Any, rope_theta: Any) -> str:
    return (
        f"`theta` must not be given beside a `rope_theta` in `rope_parameters`, got {theta} and "
        f"{rope_theta}."
    )


def _type_of(given: Mapping[str, Any]) -> str:
    kind, older = given.get("rope_type"), given.get("type")
    if kind is not None and older is not None and kind != older:
        raise ValueError(
            f'`rope_parameters` must have one type, got rope_type "{kind}" and type "{older}".'
        )
    kind = kind if kind is not None else older if older is not None else "default"
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ValueError(
            f'`rope_parameters` has the rope_type "{kind}"; known are {", ".join(_KEYS)}.'
        )
    return kind


def _check_value(key: str, value: Any) -> None:
    """Raises unless the value is one that its formula can use."""
    if key in ("rope_type", "type"):
        return
    if key == "truncate":
        if not isinstance(value, bool):
            raise TypeError(f'`rope_parameters["{key}"]` must be a bool, got {value!r}.')
        return
    numbers = [value]
    if key in ("short_factor", "long_factor"):
        if not isinstance(value, list | tuple):
            raise TypeError(f'`rope_parameters["{key}"]` must be a list, got {value!r}.')
        numbers = list(value)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float | np.number):
            raise TypeError(f'`rope_parameters["{key}"]` must be a number, got {number!r}.')
        if not 0 < number <= sys.float_info.max:  # a JSON file can hold larger integers
            raise ValueError(
                f'`rope_parameters["{key}"]` must be finite and above 0, got {number}.'
            )
    if key == "partial_rotary_factor" and value > 1:
        raise ValueError(f"`partial_rotary_factor` must be in (0, 1], got {value}.")


def _check_length_keys(kind: str, given: Mapping[str, Any]) -> None:
    """Raises unless the lengths that the formula divides by are there."""
    if kind == "dynamic" and not {
        "original_max_position_embeddings",
        "max_position_embeddings",
    } & set(given):
        raise ValueError(
            '`rope_parameters` must have "max_position_embeddings" for rope_type "dynamic"; it '
            "stands beside `rope_parameters` in config.json."
        )
    if kind == "longrope" and not {
        "attention_factor",
        "factor",
        "max_position_embeddings",
    } & set(given):
        raise ValueError(
            '`rope_parameters` must have "factor", "attention_factor" or '
            '"max_position_embeddings" for rope_type "longrope"; the last stands beside '
            "`rope_parameters` in config.json."
        )
