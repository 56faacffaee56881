"""Random combinations of vmap: which arguments are mapped, at which level, and along which axis."""

import functools
import random
from typing import NamedTuple

import jax
import numpy as np
from support import oracle
from support.cases import Case
from support.results import assert_results

B, S, Nq, C2 = 2, 2, 2, 5
SIZES = (2, 3)  # the outer and the inner mapped axis of nested vmaps


class Mode(NamedTuple):
    cache_mode: str
    C1: int
    indices: int
    Nkv: int
    D: int

    @property
    def H(self):
        return (Nq + 2 * self.Nkv) * self.D


MODES = {
    "contiguous": Mode("contiguous", C1=B, indices=B, Nkv=2, D=32),
    "more_blocks": Mode("contiguous", C1=B + 1, indices=B, Nkv=1, D=4),
    "page": Mode("page", C1=3, indices=B * S, Nkv=2, D=32),
}
# Mapped parameters, few so that the cases share their compiled shapes
PARAMETERS = (
    (),
    ("scale_k", "weight_scale"),
    ("scale_k", "scale_v", "offset_k", "offset_v", "weight_scale", "bias"),
)
OPTIONALS = {
    "plain": (),
    "optionals": ("offset_k", "offset_v", "activation_scale", "bias"),
}


@functools.cache
def arguments(mode, optionals):
    """Arrays [*SIZES, ...] of every argument."""
    rng = np.random.default_rng(0)
    _, C1, num_indices, Nkv, D = MODES[mode]
    H = MODES[mode].H

    def normal(*shape):
        return rng.normal(size=(*SIZES, *shape))

    def codes(*shape):
        return rng.integers(-128, 128, (*SIZES, *shape)).astype(np.int8)

    values = dict(
        x=(normal(B, S, H) * 1000).astype(np.int32),
        cos=normal(B, S, 1, D).astype(np.float16),
        sin=normal(B, S, 1, D).astype(np.float16),
        k_cache=codes(C1, C2, Nkv, D),
        v_cache=codes(C1, C2, Nkv, D),
        # distinct slots in page mode, some out of range in every mode
        indices=np.argsort(normal(C1 * C2 + 2), axis=-1)[..., :num_indices].astype(np.int32) - 1,
        scale_k=np.abs(normal(Nkv, D)).astype(np.float32) + 0.01,
        scale_v=np.abs(normal(Nkv, D)).astype(np.float32) + 0.01,
        weight_scale=np.abs(normal(H) / 1000).astype(np.float32) + 1e-5,
    )
    if mode != "page":
        values["indices"] %= C2 + 1
        values["indices"] -= 1
    if OPTIONALS[optionals]:
        values |= dict(
            offset_k=normal(Nkv, D).astype(np.float32),
            offset_v=normal(Nkv, D).astype(np.float32),
            activation_scale=np.abs(normal(B, S)).astype(np.float32) + 0.1,
            bias=normal(H).astype(np.float32),
        )
    return values


@functools.cache
def loop(mode, optionals, mapped):
    """The oracle's results [*SIZES, ...], example by example."""
    values = arguments(mode, optionals)
    examples = []
    for i in np.ndindex(*SIZES):
        example = {
            name: value[
                tuple(n if name in level else 0 for n, level in zip(i, mapped, strict=True))
            ]
            for name, value in values.items()
        }
        examples.append(
            oracle.dequant_rope_quant_kvcache(
                **example, kv_output=True, cache_mode=MODES[mode].cache_mode
            )
        )
    return [np.stack(r).reshape(*SIZES, *r[0].shape) for r in zip(*examples, strict=True)]


def what_is_mapped(rng, seed, mode, optionals):
    """The arguments mapped by the outer and the inner vmap; none by the outer: there is one."""
    names = list(arguments(mode, optionals))
    per_example = ["x", "cos", "sin", "k_cache", "v_cache", "indices", "activation_scale"]
    pattern = rng.randrange(len(PARAMETERS))
    mapped = []
    for level in range(2):
        tokens = {n for n in per_example if n in names and rng.random() < 0.5}
        parameters = {n for n in PARAMETERS[pattern] if n in names}
        if level == 0 and seed % 4:  # one level only
            mapped.append(frozenset())
        else:
            mapped.append(frozenset((tokens | parameters) or {"x"}))
    return tuple(mapped), pattern


def combination(seed, mode, optionals) -> Case:
    """What is mapped at which level, from where to where, and jit's place."""
    rng = random.Random(f"{mode} {seed}")
    mapped, pattern = what_is_mapped(rng, seed, mode, optionals)
    kv_output = pattern != 1
    depth = sum(map(bool, mapped))
    elsewhere = seed % 3 == 0  # mapped axes anywhere, not only in front
    out_axes = [rng.randrange(-1, 3) if elsewhere else 0 for _ in range(depth)]
    arrays, in_axes = {}, [{} for _ in range(depth)]
    for name, value in arguments(mode, optionals).items():
        here = [name in names for names in mapped]
        value = value[tuple(slice(None) if m else 0 for m in here)]  # mapped axes lead
        rank = value.ndim
        for level in reversed(range(depth)):  # move them from the innermost out
            if not here[level - depth]:
                in_axes[level][name] = None
                continue
            outside = sum(here[: level - depth]) if level else 0
            axis = in_axes[level][name] = rng.randrange(rank - outside) if elsewhere else 0
            value = np.moveaxis(value, outside, axis + outside)
        arrays[name] = value
    jitted = [rng.random() < 0.03 for _ in range(depth + 1)]

    def transform(operator):
        def f(arguments):
            return operator(**arguments)

        for level in reversed(range(depth)):
            f = jax.jit(f) if jitted[level] else f
            f = jax.vmap(f, in_axes=(in_axes[level],), out_axes=out_axes[level])
        f = jax.jit(f) if jitted[depth] else f
        return lambda **arrays: f(arrays)

    def check(results):
        expected = [want if depth == 2 else want[0] for want in loop(mode, optionals, mapped)]
        if not kv_output:
            expected[1:3] = None, None
        moved = []
        for result in results:
            actual = None if result is None else np.asarray(result)
            for level in range(depth if actual is not None else 0):
                # outermost first: each step uncovers the next one's axis
                axis = out_axes[level] % (actual.ndim - level) + level
                actual = np.moveaxis(actual, axis, level)
            moved.append(actual)
        assert_results(moved, expected, f"seed {seed}, {mapped}")

    options = {"kv_output": kv_output, "cache_mode": MODES[mode].cache_mode}
    return Case(options, lambda: iter([(arrays, check)]), transform)
