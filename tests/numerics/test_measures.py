"""Measures and formats against NumPy, on values where each of them has something to count."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_kvcache import numerics

RNG = np.random.default_rng(0)
VALUES = (RNG.standard_normal((512, 2, 8)) * np.exp2(np.arange(8) - 4)).astype(np.float32)
SCALE = (np.abs(VALUES).max(0) / 127).astype(np.float32)
CALIBRATION = numerics.Calibration(jnp.asarray(SCALE), None)
update = jax.jit(numerics.ErrorObserver.update)


def power_ratio(values, restored, axis=None):
    noise = (values.astype(np.float64) - restored) ** 2
    return 10 * np.log10(np.sum(values.astype(np.float64) ** 2, axis) / np.sum(noise, axis))


@pytest.mark.parametrize("offset", [None, np.full((2, 8), 3.25, np.float32)])
def test_error_observer(offset):
    scale = SCALE * 0.5  # so that some values saturate
    values = VALUES.copy()
    values[:3] = [[[np.nan]], [[np.inf]], [[-np.inf]]]
    observer = numerics.ErrorObserver.create((2, 8))
    whole = update(observer, values, scale, offset)
    merged = update(observer, values[:100], scale, offset).merge(
        update(observer, values[100:], scale, offset)
    )
    values = values[3:]
    codes, restored = map(np.asarray, numerics.fake_quantize(values, scale, offset))
    z = values / scale + (0 if offset is None else offset)
    for observed in (whole, merged):
        report = observed.per_channel()
        np.testing.assert_allclose(report.sqnr, power_ratio(values, restored, 0), rtol=1e-5)
        worst = np.abs(values - restored).max(0) / scale
        np.testing.assert_allclose(report.max_error, worst, rtol=1e-6)
        rate = np.mean(np.abs(z + 0.5) > 128, 0)
        assert rate.min() > 0
        np.testing.assert_allclose(report.saturation_rate, rate, rtol=1e-6)
        usage = [len(np.unique(codes[:, h, d])) / 256 for h in range(2) for d in range(8)]
        np.testing.assert_allclose(report.code_usage.reshape(-1), usage, rtol=1e-6)
        total = observed.total()
        np.testing.assert_allclose(total.sqnr, power_ratio(values, restored), rtol=1e-5)
        np.testing.assert_allclose(total.max_error, worst.max(), rtol=1e-6)
        np.testing.assert_allclose(total.saturation_rate, rate.mean(), rtol=1e-6)
        np.testing.assert_allclose(total.code_usage, np.mean(usage), rtol=1e-6)


def test_error_observer_takes_its_channels():
    observer = numerics.ErrorObserver.create((2, 8))
    for shape in ((16, 8, 2), (256,)):
        with pytest.raises(
            ValueError, match=r"`values` must have the trailing dimensions \[2, 8\]"
        ):
            observer.update(jnp.ones(shape), SCALE)
    with pytest.raises(ValueError, match=r"`scale` must have shape \[\*channels\] = \[2, 8\]"):
        observer.update(VALUES, SCALE[:1])
    with pytest.raises(ValueError, match=r"`offset` must have shape \[\*channels\] = \[2, 8\]"):
        observer.update(VALUES, SCALE, SCALE[0])


def test_largest_error_is_half_a_step_without_saturation():
    report = update(numerics.ErrorObserver.create((2, 8)), VALUES, SCALE).total()
    assert 0.49 < report.max_error <= 0.5 + 2.0**-15
    assert report.saturation_rate == 0


def restored(name):
    return np.asarray(jax.jit(numerics.FORMATS[name])(VALUES, CALIBRATION))


def test_int8_formats():
    expected = np.clip(np.rint(VALUES / SCALE), -128, 127) * SCALE
    np.testing.assert_array_equal(restored("int8 per channel"), expected)
    step = SCALE.max()
    expected = np.clip(np.rint(VALUES / step), -128, 127) * step
    np.testing.assert_array_equal(restored("int8 per tensor"), expected)
    step = np.abs(VALUES).max(-1, keepdims=True) / 127
    expected = np.rint(VALUES / step) * step
    np.testing.assert_allclose(restored("int8 per token"), expected, atol=1e-6 * step.max())
    zeros = numerics.FORMATS["int8 per token"](jnp.zeros((1, 2, 8)), CALIBRATION)
    np.testing.assert_array_equal(zeros, 0)


def test_int4_has_sixteen_codes_over_the_same_range():
    steps = restored("int4 per channel") / (SCALE * np.float32(127 / 7))
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-5)
    assert np.abs(np.rint(steps)).max() == 7
    assert len(np.unique(np.rint(steps))) == 15  # -8 is beyond the absolute maximum


@pytest.mark.parametrize(
    ("name", "dtype", "largest"),
    [
        ("float8 e4m3", ml_dtypes.float8_e4m3fn, 448),
        ("float8 e5m2", ml_dtypes.float8_e5m2, 57344),
    ],
)
def test_float8_is_a_clamped_cast(name, dtype, largest):
    values = np.array([[[0.3, -17, 447, 470, 6e4, -1e9, np.inf, 2.0**-9]]], np.float32)
    got = np.asarray(jax.jit(numerics.FORMATS[name])(values, CALIBRATION))
    expected = np.clip(values, -largest, largest).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(got, expected)
    assert np.isfinite(got).all()
    assert np.abs(got).max() == largest
    # without the clamp it would not be finite
    assert not np.isfinite(values.astype(dtype).astype(np.float32)).all()


def test_attention_error():
    q, k, v = RNG.standard_normal((3, 16, 4, 8)).astype(np.float32)
    k, v = k[:, :2], v[:, :2]
    same = numerics.attention_error(q, k, v, k, v)
    np.testing.assert_array_equal(same.weights, 0)
    assert same.output_sqnr == np.inf
    noisy_k, noisy_v = (a + 0.1 * RNG.standard_normal(a.shape).astype(np.float32) for a in (k, v))
    error = jax.jit(numerics.attention_error)(q, k, v, noisy_k, noisy_v)
    distances, outputs = np.zeros((16, 4)), np.zeros((2, 16, 4, 8))
    for t in range(16):
        for head in range(4):
            weights = []
            for i, (keys, values) in enumerate([(k, v), (noisy_k, noisy_v)]):
                scores = keys[: t + 1, head // 2] @ q[t, head] / np.sqrt(8)
                exp = np.exp(scores - scores.max())
                weights.append(exp / exp.sum())
                outputs[i, t, head] = weights[-1] @ values[: t + 1, head // 2]
            distances[t, head] = np.abs(weights[0] - weights[1]).sum() / 2
    np.testing.assert_allclose(error.weights, distances, atol=1e-6)
    np.testing.assert_allclose(error.output_sqnr, power_ratio(*outputs), rtol=1e-4)


def test_predictions():
    baseline, logits = RNG.standard_normal((2, 5, 7, 11)).astype(np.float32)
    agree = np.mean(baseline.argmax(-1) == logits.argmax(-1))
    assert numerics.token_agreement(logits, baseline) == np.float32(agree)
    assert numerics.token_agreement(baseline, baseline) == 1

    def softmax(a):
        return np.exp(a) / np.exp(a).sum(-1, keepdims=True)

    p, q = softmax(baseline.astype(np.float64)), softmax(logits.astype(np.float64))
    expected = np.sum(p * np.log(p / q), -1)
    np.testing.assert_allclose(numerics.divergence(logits, baseline), expected, rtol=1e-4)


def test_paired_difference():
    baseline = RNG.uniform(0, 3, 100).astype(np.float32)
    difference = RNG.standard_normal(100).astype(np.float32) * 0.01
    result = numerics.paired_difference(baseline + difference, baseline)
    np.testing.assert_allclose(result.mean, difference.mean(), atol=1e-6)
    expected = np.std(difference, ddof=1) / 10
    np.testing.assert_allclose(result.standard_error, expected, rtol=1e-3)
    with pytest.raises(ValueError, match=r"`baseline` must have shape \[W\] = \[2\], got \[1\]"):
        numerics.paired_difference(np.array([4.0, 1]), np.array([4.0]))
    with pytest.raises(TypeError, match=r"`values` must be 1-D, got 2-D \[1, 2\]"):
        numerics.paired_difference(np.ones((1, 2)), np.ones((1, 2)))


def test_nothing_broadcasts():
    """Every measure compares arrays of one shape."""
    ones = np.ones((5, 2, 4), np.float32)
    for measure in (numerics.sqnr, numerics.token_agreement, numerics.divergence):
        with pytest.raises(ValueError, match=r"must have the shape of `.*`, \[.*\], got \["):
            measure(ones, ones[:1])
    q, other = np.ones((5, 6, 4), np.float32), np.ones((5, 1, 4), np.float32)
    for name in ("v", "k_approximation", "v_approximation"):
        arguments = {key: ones for key in ("k", "v", "k_approximation", "v_approximation")}
        with pytest.raises(ValueError, match="must have the shape of"):
            numerics.attention_error(q, **arguments | {name: other})
    with pytest.raises(
        ValueError, match=r"`q` must have shape \[T, Nq, D\] = \[5, a multiple of 2"
    ):
        numerics.attention_error(q[:, :5], ones, ones, ones, ones)
