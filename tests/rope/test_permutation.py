"""Interleaved and partial rotary by permuted columns, against the direct rotation, to the bit."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_kvcache import dequant_rope_quant_kvcache, permute_for_rope, rope_tables

D, Nq, Nkv, S, IN = 16, 4, 2, 5, 24
POSITIONS = np.array([[3, 4, 5, 6, 2**20]], np.int32)


def direct(x, cos, sin, rotary, interleaved):
    """Turns the model's own pairs, each product and each sum rounded to float32: x [S, N, D]."""
    out = x.copy()
    half = rotary // 2
    for j in range(half):
        a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + half)
        c, s = cos[:, None, j], sin[:, None, j]
        out[:, :, a] = x[:, :, b] * -s + x[:, :, a] * c
        out[:, :, b] = x[:, :, a] * s + x[:, :, b] * c
    return out


def project(weights, scale, bias, accumulate):
    """[S, N, D] float32 of int8 weights [N * D, IN]: as the operator dequantises."""
    y = (accumulate @ weights.astype(np.int32).T).astype(np.float32) * scale + bias
    return y.reshape(S, -1, D)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [16, 8, 4])
@pytest.mark.parametrize("implementation", ["xla", "ffi"])
def test_equals_the_direct_rotation(rotary, interleaved, implementation):
    rng = np.random.default_rng(rotary)
    codes = rng.integers(-127, 128, (S, IN)).astype(np.int32)
    parts = {
        name: {
            "weights": rng.integers(-127, 128, (heads * D, IN)).astype(np.int8),
            "scale": rng.uniform(1e-3, 1e-2, heads * D).astype(np.float32),
            "bias": rng.normal(size=heads * D).astype(np.float32),
        }
        for name, heads in (("q", Nq), ("k", Nkv), ("v", Nkv))
    }
    scale_k, scale_v = (rng.uniform(0.1, 1, (Nkv, D)).astype(np.float32) for _ in "kv")
    offset_k, offset_v = (rng.normal(size=(Nkv, D)).astype(np.float32) for _ in "kv")
    parameters = {"rope_theta": 100.0, "partial_rotary_factor": rotary / D}
    cos, sin = rope_tables(POSITIONS, D, dtype=jnp.float32, rope_parameters=parameters)

    turning = [np.asarray(t)[0, :, 0, : rotary // 2] for t in (cos, sin)]
    expected = {
        n: direct(project(*parts[n].values(), codes), *turning, rotary, interleaved) for n in "qk"
    }
    z = expected["k"] / scale_k + offset_k
    k_codes = np.clip(np.rint(z), -128, 127)

    how = dict(rotary_dim=rotary, interleaved=interleaved)
    order = permute_for_rope(None, D, **how).order
    for name in "qk":
        parts[name]["weights"] = permute_for_rope(parts[name]["weights"], D, axis=-2, **how).arrays
        for other in ("scale", "bias"):
            parts[name][other] = permute_for_rope(parts[name][other], D, **how).arrays
    cache = {"k": jnp.asarray(scale_k), "offset": jnp.asarray(offset_k)}
    cache = permute_for_rope(cache, D, **how).arrays
    weights, scale, bias = (
        np.concatenate([parts[n][key] for n in "qkv"]) for key in ("weights", "scale", "bias")
    )
    result = dequant_rope_quant_kvcache(
        jnp.asarray((codes @ weights.astype(np.int32).T)[None]),
        cos,
        sin,
        jnp.zeros((1, S, Nkv, D), jnp.int8),
        jnp.zeros((1, S, Nkv, D), jnp.int8),
        jnp.zeros(1, jnp.int32),
        cache["k"],
        scale_v,
        offset_k=cache["offset"],
        offset_v=offset_v,
        weight_scale=jnp.asarray(scale),
        bias=jnp.asarray(bias),
        kv_output=True,
        implementation=implementation,
    )
    np.testing.assert_array_equal(np.asarray(result.q)[0], expected["q"][..., order])
    np.testing.assert_array_equal(np.asarray(result.k)[0], expected["k"][..., order])
    np.testing.assert_array_equal(np.asarray(result.k_cache)[0], k_codes[..., order])


def test_orders():
    def order(**how):
        return permute_for_rope(None, 8, **how).order.tolist()

    assert order() == list(range(8))
    assert order(interleaved=True) == [0, 2, 4, 6, 1, 3, 5, 7]
    assert order(rotary_dim=4) == [0, 1, 4, 5, 2, 3, 6, 7]
    assert order(rotary_dim=4, interleaved=True) == [0, 2, 4, 5, 1, 3, 6, 7]


def test_every_head_is_permuted_by_itself():
    permuted = permute_for_rope({"norm": np.arange(4), "bias": jnp.arange(8)}, 4, interleaved=True)
    assert permuted.arrays["norm"].tolist() == [0, 2, 1, 3]
    assert permuted.arrays["bias"].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(head_dim=7), "`head_dim` must be even and above 0, got 7"),
        (dict(head_dim=8, rotary_dim=3), r"even and in \(0, `head_dim` = 8\], got 3"),
        (dict(head_dim=8, rotary_dim=10), r"even and in \(0, `head_dim` = 8\], got 10"),
        (dict(head_dim=8, axis=0), r"multiple of `head_dim` = 8, got 4 in shape \[4, 8\]"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        permute_for_rope(np.zeros((4, 8)), **arguments)
