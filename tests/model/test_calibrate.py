"""Calibrating the demo model, and `python -m jax_kvcache calibrate`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.internals import calibrate_model

from jax_kvcache import numerics
from jax_kvcache.__main__ import main
from jax_kvcache.checkpoints import load_demo
from jax_kvcache.model import new_cache
from jax_kvcache.model.evaluate import cut_windows

TEXT = b"def f(x):\n    return [x, 1, None]\n\n\nclass A:\n    pass\n" * 20


@pytest.fixture(scope="module")
def model():
    return load_demo()


@pytest.fixture(scope="module")
def windows(model):
    return cut_windows([TEXT], model.config.context)


def test_padding_is_left_out(model, windows):
    """The observers of padded windows are those of the bytes that were read, and no others."""
    tokens, targets = windows.tokens[0], windows.targets[0]
    assert 0 in targets  # a window that is padding altogether
    kv = jax.jit(calibrate_model.keys_and_values)(model, tokens)
    empty = {name: numerics.MinMax.create(calibrate_model.channels(model)) for name in "kv"}
    seen = calibrate_model.observe_windows(model, empty, tokens, targets)
    for name in "kv":
        values = np.asarray(kv[name])
        rows = [values[b, : t + 1] for b, t in enumerate(targets) if t]
        read = np.concatenate(rows)
        np.testing.assert_allclose(seen[name].low, read.min(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(seen[name].high, read.max(0), rtol=1e-5, atol=1e-6)


def test_predict(model, windows):
    tokens = windows.tokens[0]
    baseline = calibrate_model.predict(model, tokens)
    assert (baseline.divergence == 0).all()
    assert (baseline.agreement == 1).all()
    own = calibrate_model.own_calibrations(model)
    nll = {
        name: calibrate_model.predict(model, tokens, baseline.logits, own, name)
        for name in ("int8 per channel", "int4 per channel")
    }
    fine, coarse = (p.divergence.mean() for p in nll.values())
    assert 0 < fine < coarse / 10
    assert nll["int8 per channel"].agreement.mean() > nll["int4 per channel"].agreement.mean()


@pytest.mark.parametrize("asymmetric", [False, True])
def test_command(tmp_path, capsys, model, windows, asymmetric):
    text, out, plot = tmp_path / "text.py", tmp_path / "scales.npz", tmp_path / "plot.png"
    text.write_bytes(TEXT)
    options = ["--asymmetric"] if asymmetric else ["--plot", str(plot)]
    assert main(["calibrate", str(text), "--out", str(out), *options]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert last == f"wrote {out}"
    assert len(table) == 1 + 2 * model.config.n_layers
    assert all(" dB " in line for line in table[1:])

    calibrated = load_demo(out)
    assert new_cache(calibrated, 1).scale_k.shape == calibrate_model.channels(model)
    empty = {name: numerics.MinMax.create(calibrate_model.channels(model)) for name in "kv"}
    seen = calibrate_model.observe_windows(model, empty, windows.tokens[0], windows.targets[0])
    for name in "kv":
        scale = calibrated.cache_params[f"scale_{name}"]
        if asymmetric:
            expected = (np.asarray(seen[name].high) - np.asarray(seen[name].low)) / 255
            offset = calibrated.cache_params[f"offset_{name}"]
            np.testing.assert_allclose(seen[name].low / scale + offset, -128, atol=1e-3)
        else:
            expected = np.asarray(seen[name].absolute_maximum()) / 127
            assert plot.read_bytes().startswith(b"\x89PNG")
        np.testing.assert_allclose(scale, expected, rtol=1e-5)
    assert ("offset_k" in calibrated.cache_params) == asymmetric


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--asymmetric", "--method", "absmax"], "`--asymmetric` needs `--method minmax`, `perc"),
        (["--percentile", "99"], "`--percentile` goes with `--method percentile`, got `--method a"),
        (
            ["--method", "percentile", "--percentile", "0"],
            "`--percentile` must be in (0, 100], got 0.",
        ),
        (["--out", "/nonexistent/scales.npz"], "cannot write '/nonexistent/scales.npz'"),
        (["--plot", "/nonexistent/plot.png"], "cannot write '/nonexistent/plot.png'"),
    ],
)
def test_command_errors(tmp_path, capsys, options, message):
    text = tmp_path / "text.py"
    text.write_bytes(TEXT)
    assert main(["calibrate", str(text), "--out", str(tmp_path / "scales.npz"), *options]) == 2
    assert message in capsys.readouterr().err


def test_command_needs_text(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.write_bytes(b"x")
    assert main(["calibrate", str(empty), "--out", str(tmp_path / "scales.npz")]) == 2
    assert "the text must have at least 2 bytes" in capsys.readouterr().err
    assert main(["calibrate", str(tmp_path / "no"), "--out", str(tmp_path / "scales.npz")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_nan_is_what_marks_padding(model):
    kv = calibrate_model.keys_and_values(
        model, jnp.zeros((2, 8), jnp.int32), jnp.array([3, 0], jnp.int32)
    )
    read = np.isfinite(kv["k"]).all((2, 3, 4))
    np.testing.assert_array_equal(read, [[True] * 4 + [False] * 4, [False] * 8])
