"""Every wrong call gets its message, before anything runs."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support import calls

import jax_kvcache
from jax_kvcache import dequant_rope_quant_kvcache

SIZES = {"B": 2, "S": 3, "Nq": 4, "Nkv": 2, "D": 64, "C1": 2, "C2": 8}  # H = 512, T = 6
F16, F32, I32 = np.float16, np.float32, np.int32


def array(shape, dtype=F32):
    return np.ones(shape, dtype)


APART = tuple(array((2, 3, width), I32) for width in (256, 128, 128))
WEIGHTS_APART = tuple(array((width,)) for width in (256, 128, 128))

CASES = {
    # what is wrong: (changed arguments, error, message)
    "x_missing": ({"x": None}, TypeError, "`x` is required, got None"),
    "scale_missing": ({"scale_v": None}, TypeError, "`scale_v` is required, got None"),
    "indices_missing": ({"indices": None}, TypeError, "`indices` is required, got None"),
    "x_list": ({"x": [1, 2]}, TypeError, "`x` must be an array, got list"),
    "x_dtype": (
        {"x": array((2, 3, 512), np.int8)},
        TypeError,
        "`x` must have dtype int32 or float16 or bfloat16 or float32, got int8",
    ),
    "x_rank": (
        {"x": array((2, 3, 1, 512), I32)},
        TypeError,
        r"`x` must be 2-D or 3-D, got 4-D \[2, 3, 1, 512\]",
    ),
    "x_empty": ({"x": array((0, 3, 512), I32)}, ValueError, "`x` has an empty dimension: B = 0"),
    "x_width": (
        {"x": array((2, 3, 500), I32)},
        ValueError,
        r"H = \(Nq \+ 2\*Nkv\) \* D with Nkv = 2 and D = 64 from `k_cache`, got H = 500",
    ),
    "x_without_q": ({"x": array((2, 3, 256), I32)}, ValueError, "got H = 256"),
    "cos_dtype": ({"cos": array((2, 3, 1, 64), I32)}, TypeError, "`cos` must have dtype float16"),
    "sin_dtype": (
        {"sin": array((2, 3, 1, 64), F16)},
        TypeError,
        "`sin` must have dtype bfloat16, got float16",
    ),
    "tables_unlike_x": (
        {"x": array((2, 3, 512), F16)},
        TypeError,
        "`cos` must have dtype float16, got bfloat16",
    ),
    "cos_rank": (
        {"cos": array((2, 3, 64), ml_dtypes.bfloat16)},
        TypeError,
        r"`cos` must be 4-D, got 3-D \[2, 3, 64\]",
    ),
    "sin_shape": (
        {"sin": array((2, 3, 1, 32), ml_dtypes.bfloat16)},
        ValueError,
        r"`sin` must have shape \[B, S, 1, D\] = \[2, 3, 1, 64\], got \[2, 3, 1, 32\]",
    ),
    "cache_dtype": (
        {"v_cache": array((2, 8, 2, 64), np.uint8)},
        TypeError,
        "`v_cache` must have dtype int8, got uint8",
    ),
    "cache_rank": (
        {"k_cache": array((8, 2, 64), np.int8)},
        TypeError,
        r"`k_cache` must be 4-D, got 3-D \[8, 2, 64\]",
    ),
    "caches_differ": (
        {"v_cache": array((2, 9, 2, 64), np.int8)},
        ValueError,
        r"`v_cache` must have shape \[C1, C2, Nkv, D\] = \[2, 8, 2, 64\], got \[2, 9, 2, 64\]",
    ),
    "cache_empty": (
        {"k_cache": array((2, 0, 2, 64), np.int8)},
        ValueError,
        "`k_cache` has an empty dimension: C2 = 0",
    ),
    "odd_head": (
        {n: array((2, 8, 2, 63), np.int8) for n in ("k_cache", "v_cache")},
        ValueError,
        "`k_cache` must have an even head size D, got 63",
    ),
    "too_few_rows": (
        {n: array((1, 8, 2, 64), np.int8) for n in ("k_cache", "v_cache")},
        ValueError,
        "`k_cache` must have C1 >= B = 2 in contiguous mode, got C1 = 1",
    ),
    "indices_dtype": (
        {"indices": array((2,), np.int64)},
        TypeError,
        "`indices` must have dtype int32, got int64",
    ),
    "indices_shape": (
        {"indices": array((3,), I32)},
        ValueError,
        r"`indices` must have shape \[B\] = \[2\] or \[B, 1\] = \[2, 1\], got \[3\]",
    ),
    "indices_page": (
        {"indices": array((2,), I32), "cache_mode": "page"},
        ValueError,
        r"`indices` must have shape \[B\*S\] = \[6\] or \[B, S\] = \[2, 3\], got \[2\]",
    ),
    "scale_dtype": ({"scale_k": array((2, 64), F16)}, TypeError, "`scale_k` must have dtype float"),
    "scale_shape": (
        {"scale_k": array((8, 64))},
        ValueError,
        r"`scale_k` must have shape \[Nkv, D\] = \[2, 64\] or \[Nkv\*D\] = \[128\], got \[8, 64\]",
    ),
    "lone_offset_k": (
        {"offset_k": array((2, 64))},
        ValueError,
        "must be given together, got `offset_k` without `offset_v`",
    ),
    "lone_offset_v": (
        {"offset_v": array((2, 64))},
        ValueError,
        "must be given together, got `offset_v` without `offset_k`",
    ),
    "offset_shape": (
        {"offset_k": array((2, 64)), "offset_v": array((64,))},
        ValueError,
        r"`offset_v` must have shape .*, got \[64\]",
    ),
    "weight_scale_missing": (
        {"weight_scale": None},
        TypeError,
        "`weight_scale` is required when `x` is int32, got None",
    ),
    "weight_scale_shape": (
        {"weight_scale": array((511,))},
        ValueError,
        r"`weight_scale` must have shape \[H\] = \[512\] or \[1, H\] = \[1, 512\], got \[511\]",
    ),
    "activation_scale_shape": (
        {"activation_scale": array((2,))},
        ValueError,
        r"`activation_scale` must have shape \[B\*S\] = \[6\] or \[B, S\] = \[2, 3\], got \[2\]",
    ),
    "activation_scale_dtype": (
        {"activation_scale": array((6,), F16)},
        TypeError,
        "`activation_scale` must have dtype float32, got float16",
    ),
    "bias_dtype": (
        {"bias": array((512,), np.float64)},
        TypeError,
        "`bias` must have dtype float16 or bfloat16 or float32 or int32, got float64",
    ),
    "bias_shape": (
        {"bias": array((1,))},
        ValueError,
        r"`bias` must have shape \[H\] = \[512\], got \[1\]",
    ),
    "splits_count": ({"size_splits": (256, 256)}, TypeError, "`size_splits` must be three ints"),
    "splits_type": ({"size_splits": 512}, TypeError, "`size_splits` must be three ints .*got 512"),
    "splits_float": ({"size_splits": (256.0, 128, 128)}, TypeError, "must be three ints"),
    "splits_kv": (
        {"size_splits": (128, 192, 192)},
        ValueError,
        r"`size_splits` must be \(Nq\*64, 128, 128\) .*got \(128, 192, 192\)",
    ),
    "splits_sum": (
        {"size_splits": (192, 128, 128)},
        ValueError,
        "must add up to H = 512, got .* with sum 448",
    ),
    "num_q_heads": (
        {"num_q_heads": 5},
        ValueError,
        r"D = 576 with Nq = `num_q_heads` = 5, .*got H = 512, which is Nq = 4",
    ),
    "num_q_heads_type": (
        {"num_q_heads": True},
        TypeError,
        "`num_q_heads` must be an int, got True",
    ),
    "qkv_shards_type": ({"qkv_shards": 2.0}, TypeError, "`qkv_shards` must be an int, got 2.0"),
    "qkv_shards": (
        {"qkv_shards": 2},
        ValueError,
        "`qkv_shards` must be 1 or None outside .* got 2. Undo the interleaving with `deinter",
    ),
    "x_apart_alone": (
        {"x": APART},
        TypeError,
        r"`weight_scale` must be a tuple \(q, k, v\), as `x` is, got one array",
    ),
    "weight_scale_apart_alone": (
        {"weight_scale": (array((512,)),) * 3},
        TypeError,
        "`weight_scale` must be one array, as `x` is, got a tuple of 3",
    ),
    "x_of_two": (
        {"x": APART[:2], "weight_scale": WEIGHTS_APART},
        TypeError,
        r"`x` must be one array or a tuple \(q, k, v\) of three, got \(ndarray, ndarray\)",
    ),
    "x_of_dtypes": (
        {"x": (*APART[:2], array((2, 3, 128))), "weight_scale": WEIGHTS_APART},
        TypeError,
        "`x` must have one dtype for q, k and v, got int32, int32 and float32",
    ),
    "x_of_widths": (
        {"x": (*APART[:2], array((2, 3, 64), I32)), "weight_scale": WEIGHTS_APART},
        ValueError,
        r"must be 256, 128 and 128, got \[2, 3, 256\] and \[2, 3, 128\] and \[2, 3, 64\]",
    ),
    "weight_scale_of_widths": (
        {"x": APART, "weight_scale": (array((192,)), *WEIGHTS_APART[1:])},
        ValueError,
        r"`weight_scale` as \(q, k, v\) .* must be 256, 128 and 128, got \[192\] and \[128\]",
    ),
    "x_apart_dtype": (
        {"x": tuple(part.astype(np.int64) for part in APART), "weight_scale": WEIGHTS_APART},
        TypeError,
        "`x` must have dtype int32 or float16 or bfloat16 or float32, got int64",
    ),
    "weight_scale_apart_dtype": (
        {"x": APART, "weight_scale": tuple(part.astype(np.float64) for part in WEIGHTS_APART)},
        TypeError,
        "`weight_scale` must have dtype float32, got float64",
    ),
    "x_apart_with_an_order": (
        {"x": APART, "weight_scale": WEIGHTS_APART, "qkv_shards": 1},
        TypeError,
        r"`qkv_shards` must be None where `x` is a tuple",
    ),
    "quant_mode": ({"quant_mode": "dynamic"}, ValueError, "`quant_mode` must be 'static', got 'd"),
    "layout": ({"layout": "BNSD"}, ValueError, "`layout` must be 'BSND', got 'BNSD'"),
    "cache_mode": (
        {"cache_mode": "paged"},
        ValueError,
        "`cache_mode` must be 'contiguous' or 'page', got 'paged'",
    ),
    "kv_output": ({"kv_output": "yes"}, ValueError, "`kv_output` must be False or True, got 'yes'"),
    "kv_output_array": (
        {"kv_output": np.array([True, True])},
        ValueError,
        "`kv_output` must be False or True, got array",
    ),
    "indices_mode": ({"indices_mode": "clip"}, ValueError, "`indices_mode` must be 'drop' or"),
    "implementation": (
        {"implementation": "cuda"},
        ValueError,
        "`implementation` must be None or 'ffi' or 'xla', got 'cuda'",
    ),
}


@pytest.mark.parametrize("function", [dequant_rope_quant_kvcache, jax_kvcache.explain])
@pytest.mark.parametrize("case", CASES)
def test_wrong_call(case, function):
    changed, error, message = CASES[case]
    with pytest.raises(error, match=message):
        function(**calls.ones(**SIZES) | changed)


@pytest.mark.parametrize("function", [lambda f: f, jax.jit])
@pytest.mark.parametrize(
    ("ignored", "message"),
    [
        (("bias",), "`bias` has no effect where `x` is bfloat16"),
        (("weight_scale", "activation_scale"), "`weight_scale` and `activation_scale` have no eff"),
    ],
)
def test_one_warning_for_what_has_no_effect_on_a_float_x(ignored, message, function):
    call = calls.ones(**SIZES, x_dtype=jnp.bfloat16)
    shapes = {"bias": (512,), "weight_scale": (512,), "activation_scale": (2, 3)}
    more = {name: jnp.full(shapes[name], 7.0) for name in ignored}
    with pytest.warns(UserWarning, match=message) as warned:
        q = function(lambda call: dequant_rope_quant_kvcache(**call))(call | more).q
    assert len(warned) == 1
    assert warned[0].filename == __file__
    np.testing.assert_array_equal(q, dequant_rope_quant_kvcache(**call).q)


@pytest.mark.parametrize("function", [dequant_rope_quant_kvcache, jax_kvcache.explain])
def test_one_array_as_both_caches(function):
    call = calls.ones(**SIZES)
    with pytest.raises(ValueError, match="two arrays, got one array passed as both"):
        function(**call | {"v_cache": call["k_cache"]})


@pytest.mark.parametrize(
    ("C1", "C2", "cache_mode"),
    [(2**16, 2**15, "page"), (2, 2**31, "contiguous"), (4, 2**29, "contiguous")],
)
def test_more_rows_than_int32_counts(C1, C2, cache_mode):
    call = calls.arguments(B=2, S=1, D=2, C1=C1, C2=C2, cache_mode=cache_mode)
    with pytest.raises(ValueError, match=r"`k_cache` must have at most 2147483647 rows .*Split"):
        jax.eval_shape(lambda call: dequant_rope_quant_kvcache(**call, cache_mode=cache_mode), call)


def test_the_largest_slot_space_is_taken():
    call = calls.arguments(B=2, S=1, D=2, C1=2, C2=2**31 - 1)
    result = jax.eval_shape(lambda call: dequant_rope_quant_kvcache(**call), call)
    assert result.k_cache.shape == call["k_cache"].shape


def test_positional_order_is_the_operators():
    call = calls.ones(**SIZES)
    weight_scale = call.pop("weight_scale")
    result = dequant_rope_quant_kvcache(*call.values(), (256, 128, 128), weight_scale=weight_scale)
    assert list(call) == [
        "x", "cos", "sin", "k_cache", "v_cache", "indices", "scale_k", "scale_v"
    ]  # fmt: skip
    assert result.q.shape == (2, 3, 4, 64)
    assert result.k is None
    assert result.v is None


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_allowed_shapes_mean_the_same(shape):
    call = calls.ones(**SIZES)
    expected = dequant_rope_quant_kvcache(**call)
    other = call | {
        "indices": jnp.ones(shape, I32),
        "scale_k": call["scale_k"].reshape(-1),
        "weight_scale": call["weight_scale"].reshape(1, -1),
        "activation_scale": jnp.ones((6,) if shape == (2,) else (2, 3), F32),
    }
    for a, b in zip(dequant_rope_quant_kvcache(**other), expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_array_equal(a, b)
