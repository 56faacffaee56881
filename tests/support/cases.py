"""A case: calls of the operator that share a form, each with the check of its results."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from support import golden_calls, oracle, random_calls
from support.results import assert_results

from jax_kvcache import dequant_rope_quant_kvcache

Arrays = dict[str, Any]  # of a call, by the arguments' names


def operator(options, implementation):
    return functools.partial(dequant_rope_quant_kvcache, **options, implementation=implementation)


def jitted(options, implementation):
    return jax.jit(operator(options, implementation))


class Case(NamedTuple):
    """Calls that one function makes.

    Attributes:
      options: the operator's static arguments.
      calls: gives each call's arrays, and a function that asserts on its results.
      transform: makes of the operator the function that is called.
    """

    options: dict[str, Any]
    calls: Callable[[], Iterator[tuple[Arrays, Callable[[tuple], None]]]]
    transform: Callable[[Callable], Callable] = jax.jit

    def function(self, implementation):
        return self.transform(operator(self.options, implementation))

    def run(self, implementation, most=None) -> int:
        """Makes the calls, or at most so many, asserts on their results, and counts them."""
        function, count = self.function(implementation), 0
        for arrays, check in itertools.islice(self.calls(), most):
            check(function(**arrays))
            count += 1
        return count


def expecting(expected, where):
    return functools.partial(assert_results, expected=expected, where=where)


def against_oracle(options, draw) -> Case:
    """The calls that `draw()` gives, as pairs of a description and arrays, against the oracle.

    The oracle computes what is expected once, when the first result is checked.
    """
    known = {name: options[name] for name in ("cache_mode", "kv_output") if name in options}

    def calls():
        for where, arrays in draw():
            expected = functools.cache(
                functools.partial(oracle.dequant_rope_quant_kvcache, **arrays, **known)
            )
            yield arrays, functools.partial(check, expected, where)

    def check(expected, where, results):
        assert_results(results, expected(), where)

    return Case(options, calls)


def golden(name) -> Case:
    """One golden call."""
    call = golden_calls.load(name)
    return Case(call.options, lambda: iter([(call.inputs, expecting(call.expected, name))]))


def of_form(form, seed, draws) -> Case:
    """Random calls of a form."""

    def draw():
        rng = np.random.default_rng(seed)
        for number in range(draws):
            yield f"{form}, draw {number}", random_calls.draw_inputs(rng, form)

    return against_oracle(form.options, draw)


def random(seed, draws) -> Case:
    """Random calls of a random form."""
    return of_form(random_calls.draw_form(np.random.default_rng(seed)), seed, draws)
