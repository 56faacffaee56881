"""The tests' own tools can fail: comparisons see a wrong bit, processes show what they wrote."""

import ml_dtypes
import numpy as np
import pytest
from support import process
from support.results import assert_results, assert_same_bits

import jax_kvcache

FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32)


def numbers(dtype):
    """One, two zeros, NaN, infinity, the smallest number and its negative."""
    tiny = ml_dtypes.finfo(dtype).smallest_subnormal
    return np.array([1, 0, -0.0, np.nan, np.inf, tiny, -tiny]).astype(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_another_bit_is_seen(dtype):
    expected = numbers(dtype)
    assert_same_bits(expected.copy(), expected)
    for i, wrong in enumerate((2, -0.0, 0, 1, np.nan, 1, 1)):
        actual = expected.copy()
        actual[i] = wrong
        with pytest.raises(AssertionError, match="here"):
            assert_same_bits(actual, expected, "here")
    step = expected.copy()
    step.view(f"uint{8 * step.itemsize}")[0] += 1
    with pytest.raises(AssertionError):
        assert_same_bits(step, expected)
    other_nan = expected.copy()
    other_nan.view(f"uint{8 * step.itemsize}")[3] += 1
    assert_same_bits(other_nan, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_subnormals_of_float32_and_bfloat16_may_be_zeros_of_their_sign(dtype):
    expected, flushed, swapped = (numbers(dtype) for _ in range(3))
    flushed[5:] = 0, -0.0
    swapped[5:] = -0.0, 0
    with pytest.raises(AssertionError):
        assert_same_bits(swapped, expected)
    if dtype is np.float16:
        with pytest.raises(AssertionError):
            assert_same_bits(flushed, expected)
    else:
        assert_same_bits(flushed, expected)
    with pytest.raises(AssertionError):  # a zero is no subnormal
        assert_same_bits(expected, flushed)


def test_dtypes_shapes_and_codes():
    codes = np.array([1, 2], np.int8)
    for other in (codes.astype(np.int32), codes[:1], codes + np.int8(1)):
        with pytest.raises(AssertionError):
            assert_same_bits(other, codes)


def test_a_result_that_is_missing_or_one_too_many():
    codes = np.zeros(1, np.int8)
    assert_results((codes, None, None, codes, codes), (codes, None, None, codes, codes))
    with pytest.raises(AssertionError, match="call 7: k"):
        assert_results((codes,) * 5, (codes, None, None, codes, codes), "call 7")
    with pytest.raises(AssertionError):
        assert_results((codes, None, None, codes, codes), (codes,) * 5)
    with pytest.raises(ValueError, match="zip"):
        assert_results((codes,) * 4, (codes,) * 5)


def test_a_process_that_fails_or_hangs_shows_what_it_wrote():
    code = "import sys; print('said'); sys.stderr.write('complained'); sys.stderr.flush(); "
    with pytest.raises(AssertionError, match=r"(?s)exit status 3.*said.*complained"):
        process.run("-c", code + "sys.exit(3)")
    with pytest.raises(AssertionError, match=r"(?s)not done after 2 s.*said.*complained"):
        process.run("-c", code + "sys.stdout.flush(); import time; time.sleep(60)", timeout=2)


def test_a_process_has_this_import_path():
    code = "import support.process as p, jax_kvcache; print(p.__file__, jax_kvcache.__file__)"
    assert process.run("-c", code).split() == [process.__file__, jax_kvcache.__file__]
