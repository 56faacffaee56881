"""The frequencies of each RoPE type, as the transformers library defines them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# Each formula maps a type's values, the base theta, the rotary dimensions r and the longest
# sequence to [r/2] float64 radians per position and the factor of cos and sin.
Formula = Callable[[Mapping[str, Any], float, int, Any], tuple[np.ndarray, float]]


def _plain(theta: float, dim: int) -> np.ndarray:
    return theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)


def _default(values, theta, dim, length):
    return _plain(theta, dim), 1.0


def _linear(values, theta, dim, length):
    return _plain(theta, dim) / values["factor"], 1.0


def _dynamic(values, theta, dim, length):
    """The base grows with the length, so that the lowest frequency stretches and none jumps."""
    trained = values.get("original_max_position_embeddings", values.get("max_position_embeddings"))
    factor, length = values["factor"], max(length, trained)
    grown = theta * (factor * length / trained - (factor - 1)) ** (dim / (dim - 2))
    return _plain(grown, dim), 1.0


def _llama3(values, theta, dim, length):
    """Long wavelengths are stretched, short ones kept, with a ramp in between."""
    frequency = _plain(theta, dim)
    low, high, factor = values["low_freq_factor"], values["high_freq_factor"], values["factor"]
    if not low < high:
        raise ValueError(
            '`rope_parameters["high_freq_factor"]` must be above "low_freq_factor" = '
            f"{low}, got {high}."
        )
    turns = values["original_max_position_embeddings"] * frequency / (2 * np.pi)  # in that length
    ramp = np.clip((turns - low) / (high - low), 0, 1)  # 0: stretched, 1: kept
    return (1 - ramp) * frequency / factor + ramp * frequency, 1.0


def _yarn(values, theta, dim, length):
    """A ramp over dimensions, between those that turn `beta_fast` and `beta_slow` times."""
    trained, factor = values["original_max_position_embeddings"], values["factor"]

    def dimension(rotations):
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(values.get("beta_fast", 32)), dimension(values.get("beta_slow", 1))
    if values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)  # 0: kept, 1: stretched
    frequency = _plain(theta, dim)
    return frequency / factor * ramp + frequency * (1 - ramp), _yarn_attention_factor(values)


def _yarn_attention_factor(values) -> float:
    if "attention_factor" in values:
        return float(values["attention_factor"])
    factor = values["factor"]

    def scaled(mscale):
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if "mscale" in values and "mscale_all_dim" in values:
        return scaled(values["mscale"]) / scaled(values["mscale_all_dim"])
    return scaled(1)


def _longrope(values, theta, dim, length):
    """A factor of its own for every frequency, one list up to the trained length, one past it."""
    trained = values["original_max_position_embeddings"]
    name = "long_factor" if length > trained else "short_factor"
    if len(values[name]) != dim // 2:
        raise ValueError(
            f'`rope_parameters["{name}"]` must have r/2 = {dim // 2} numbers, got '
            f"{len(values[name])}."
        )
    frequency = _plain(theta, dim) / np.asarray(values[name])
    if "attention_factor" in values:
        return frequency, float(values["attention_factor"])
    factor = values.get("factor") or values["max_position_embeddings"] / trained
    if factor <= 1:
        return frequency, 1.0
    return frequency, math.sqrt(1 + math.log(factor) / math.log(trained))


FORMULAS: dict[str, Formula] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
