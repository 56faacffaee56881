"""XLA:CPU must not be given two instructions in one fusion whose names it takes for one.

It merges `dynamic-slice.N`, the partitioner's name, with `dynamic_slice.N`, JAX's, into a function
that calls itself: the program never ends.
"""

import jax
import pytest
from support import automatic, hlo, process, public_calls


@pytest.mark.parametrize("name", automatic.STEPS)
def test_no_fusion_has_both_names(name):
    step = automatic.STEPS[name]
    compiled = automatic.over_devices(step).lower(*automatic.placed(step)).compile()
    fusions = hlo.fusions(compiled.as_text())
    assert fusions, "the text is read wrongly"
    both = [f for f, names in fusions.items() if {"dynamic-slice", "dynamic_slice"} <= names]
    assert not both


def test_the_programs_end():
    """In a process of their own, since nothing else could stop one that does not."""
    printed = process.run(process.PROGRAMS / "automatic_layouts.py", timeout=180)
    assert printed.splitlines() == list(automatic.STEPS)


def test_no_public_function_emits_a_dynamic_slice():
    arrays = public_calls.arrays()
    for name, call in public_calls.calls().items():
        if not name.startswith("explain"):
            assert "dynamic_slice" not in jax.jit(call).lower(arrays).as_text(), name
