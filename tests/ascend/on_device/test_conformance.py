"""The conformance suite on the device; what its operator refuses goes through XLA, visibly."""

import itertools
import warnings

import pytest
from support import cases, conformance
from support.internals import ascend

from jax_kvcache import explain


def is_taken(case):
    """Whether the operator takes the case's calls; for vmap it depends on what is mapped."""
    arrays, _ = next(case.calls())
    return explain(**arrays, **case.options, platform=ascend.PLATFORMS[0]).implementation == "ffi"


TAKEN, REFUSED = [], []
for _name in conformance.CASES:
    if not _name.startswith("vmap"):
        (TAKEN if is_taken(conformance.CASES[_name][0]()) else REFUSED).append(_name)
VMAPPED = [  # "more_blocks" has a head size that the operator refuses
    name for name in conformance.CASES if name.startswith(("vmap-contiguous", "vmap-page"))
]
NUM_REFUSED = 6  # of those, so many run: XLA on the device is not what is tested here
NUM_MORE_FORMS = 14  # with those of the suite that the operator takes: 30 forms
WARNING = "runs its XLA implementation on (ascend|ASCEND): the "


def test_what_the_operator_takes():
    for kind in ("golden", "edges", "skipped_nan", "promised", "duplicates"):
        assert not [name for name in REFUSED if name.startswith(kind)]
    assert len([name for name in TAKEN if name.startswith("random")]) == 30 - NUM_MORE_FORMS
    assert {name for name in REFUSED if name.startswith("dtypes")} == {
        name for name in conformance.CASES if name.startswith("dtypes") and "cos_float32" in name
    }


@pytest.mark.ascend_device
@pytest.mark.parametrize("name", TAKEN)
def test_case(name, launches):
    [make] = conformance.CASES[name]
    count = make().run("ffi")
    assert launches() in (count, None)


@pytest.mark.parametrize("name", REFUSED[:NUM_REFUSED])
def test_refused(name, standin):
    [make] = conformance.CASES[name]
    with pytest.warns(UserWarning, match=WARNING):
        make().run(None, most=1)
    assert standin.launches == 0
    with pytest.raises(NotImplementedError, match='`implementation="ffi"`: the '):
        make().run("ffi")


@pytest.mark.ascend_device
@pytest.mark.parametrize("name", VMAPPED)
def test_vmap(name, launches):
    """Each combination is one launch, unless a parameter is mapped: the operator takes one."""
    taken, refused = 0, 0
    for make in conformance.CASES[name]:
        try:
            taken += make().run("ffi")
        except NotImplementedError as error:
            assert "got one for each group" in str(error)  # noqa: PT017
            refused += 1
    assert taken > 0
    assert refused > 0
    assert launches() in (taken, None)


def more_cases():
    """Random cases beyond those of the suite that the operator takes."""
    seeds = itertools.count(conformance.NUM_FORMS)
    drawn = (cases.random(seed, conformance.DRAWS_PER_FORM) for seed in seeds)
    return list(itertools.islice(filter(is_taken, drawn), NUM_MORE_FORMS))


@pytest.mark.ascend_device
@pytest.mark.parametrize("case", more_cases(), ids=range(NUM_MORE_FORMS))
def test_more_random_forms(case, launches):
    count = case.run("ffi")
    assert launches() in (count, None)


def test_the_operator_is_the_default(standin):
    [make] = conformance.CASES[TAKEN[0]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make().run(None) == 1
    assert standin.launches == 1
