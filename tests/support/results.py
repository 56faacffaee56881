"""Compares results of the operator with what they must be: to the bit."""

import ml_dtypes
import numpy as np

NAMES = ("q", "k", "v", "k_cache", "v_cache")
OF_A_STEP = ("q", "k_cache", "v_cache")  # what a step of decoding hands on
FLUSHED = (np.dtype("float32"), np.dtype(ml_dtypes.bfloat16))  # subnormals may become zeros


def assert_same_bits(actual, expected, where=""):
    """Equal to the bit, the sign of a zero included, with two exceptions.

    Any NaN equals any NaN, and a float32 or bfloat16 subnormal may be a zero of its sign.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, where
    assert actual.shape == expected.shape, where
    if np.issubdtype(expected.dtype, np.integer):
        np.testing.assert_array_equal(actual, expected, err_msg=where)
        return
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan, err_msg=where)
    bits = np.dtype(f"uint{8 * expected.dtype.itemsize}")
    got, wanted = actual.view(bits), expected.view(bits)
    compared = ~nan
    if expected.dtype in FLUSHED:
        with np.errstate(invalid="ignore"):  # NumPy before 2.5 warns of a bfloat16 NaN
            subnormal = (expected != 0) & (np.abs(expected) < ml_dtypes.finfo(expected.dtype).tiny)
        sign = np.where(np.signbit(expected), bits.type(1 << (8 * bits.itemsize - 1)), bits.type(0))
        compared &= ~(subnormal & (got == sign))
    np.testing.assert_array_equal(got[compared], wanted[compared], err_msg=where)


def assert_results(actual, expected, where="", names=NAMES):
    """The named results equal the expected ones to the bit; where None is expected, None it is.

    Args:
      actual: the results, in the order of `names`.
      expected: the same, or a mapping from all of the names.
      where: what is compared, for the message.
      names: the results' names.
    """
    if isinstance(expected, dict):
        expected = [expected[name] for name in names]
    for name, got, wanted in zip(names, actual, expected, strict=True):
        if wanted is None:
            assert got is None, f"{where}: {name}"
        else:
            assert_same_bits(got, wanted, f"{where}: {name}")
