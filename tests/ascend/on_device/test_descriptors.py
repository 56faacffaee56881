"""What the operator receives, against its documentation: dtypes, shapes, strides, modes."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support.internals import Operands, WriteOptions, primitive

from jax_kvcache import dequant_rope_quant_kvcache

FLOAT, FLOAT16, INT8, INT32, BF16 = 0, 1, 2, 3, 27  # aclDataType
ND = 2  # aclFormat


def descriptor(dtype, dims):
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    return {
        "dtype": dtype, "dims": dims, "strides": strides, "storage_dims": dims, "format": ND,
        "offset": 0,
    }  # fmt: skip


def received(standin, cache_mode, kv_output, inputs):
    """Runs the call and returns the descriptors, without the addresses."""
    function = functools.partial(
        dequant_rope_quant_kvcache,
        implementation="ffi",
        kv_output=kv_output,
        cache_mode=cache_mode,
    )
    jax.block_until_ready(jax.jit(function)(**inputs))
    found = standin.ledger()["descriptors"]
    for value in found.values():
        if isinstance(value, dict):
            assert value.pop("data") & 2**52 or value["dims"] == [0]  # a device address
    return found


MODES = {"quant_mode": "static", "layout": "BSND", "cache_mode": "page"}


def test_everything_given(standin):
    """int32 x [B, S, H] = [2, 3, 384], float16 tables, Nq, Nkv, D = 2, 2, 64, contiguous."""
    inputs = {
        "x": np.ones((2, 3, 384), np.int32),
        "cos": np.ones((2, 3, 1, 64), np.float16),
        "sin": np.ones((2, 3, 1, 64), np.float16),
        "k_cache": np.zeros((2, 8, 2, 64), np.int8),
        "v_cache": np.zeros((2, 8, 2, 64), np.int8),
        "indices": np.zeros(2, np.int32),
        "weight_scale": np.ones((1, 384), np.float32),
        "activation_scale": np.ones((2, 3), np.float32),
        "bias": np.ones(384, np.int32),
    } | {name: np.ones(128, np.float32) for name in ("scale_k", "scale_v", "offset_k", "offset_v")}
    assert received(standin, "contiguous", True, inputs) == MODES | {
        "x": descriptor(INT32, [6, 384]),
        "cos": descriptor(FLOAT16, [6, 64]),
        "sin": descriptor(FLOAT16, [6, 64]),
        "k_cache": descriptor(INT8, [2, 8, 2, 64]),
        "v_cache": descriptor(INT8, [2, 8, 2, 64]),
        "indices": descriptor(INT32, [6]),
        "scale_k": descriptor(FLOAT, [2, 64]),
        "scale_v": descriptor(FLOAT, [2, 64]),
        "offset_k": descriptor(FLOAT, [2, 64]),
        "offset_v": descriptor(FLOAT, [2, 64]),
        "weight_scale": descriptor(FLOAT, [384]),
        "activation_scale": descriptor(FLOAT, [6]),
        "bias": descriptor(INT32, [384]),
        "q": descriptor(FLOAT16, [6, 2, 64]),
        "k": descriptor(FLOAT16, [6, 2, 64]),
        "v": descriptor(FLOAT16, [6, 2, 64]),
        "size_splits": [128, 128, 128],
        "kv_output": True,
    }


def test_least_given(standin):
    """bfloat16 x [B, H] = [4, 320], Nq, Nkv, D = 3, 1, 64, page, no k and v."""
    bf16 = ml_dtypes.bfloat16
    inputs = {
        "x": np.ones((4, 320), bf16),
        "cos": np.ones((4, 64), bf16),
        "sin": np.ones((4, 64), bf16),
        "k_cache": np.zeros((5, 16, 1, 64), np.int8),
        "v_cache": np.zeros((5, 16, 1, 64), np.int8),
        "indices": np.arange(4, dtype=np.int32),
        "scale_k": np.ones((1, 64), np.float32),
        "scale_v": np.ones((1, 64), np.float32),
    }
    absent = ("offset_k", "offset_v", "weight_scale", "activation_scale", "bias")
    assert received(standin, "page", False, inputs) == MODES | dict.fromkeys(absent) | {
        "x": descriptor(BF16, [4, 320]),
        "cos": descriptor(BF16, [4, 64]),
        "sin": descriptor(BF16, [4, 64]),
        "k_cache": descriptor(INT8, [5, 16, 1, 64]),
        "v_cache": descriptor(INT8, [5, 16, 1, 64]),
        "indices": descriptor(INT32, [4]),
        "scale_k": descriptor(FLOAT, [1, 64]),
        "scale_v": descriptor(FLOAT, [1, 64]),
        "q": descriptor(BF16, [4, 3, 64]),
        "k": descriptor(BF16, [0]),
        "v": descriptor(BF16, [0]),
        "size_splits": [192, 64, 64],
        "kv_output": False,
    }


@pytest.mark.parametrize("bias_dtype", [jnp.float32, jnp.float16, jnp.bfloat16, jnp.int32])
def test_bias_dtypes(bias_dtype, standin):
    inputs = {
        "x": np.ones((4, 192), np.int32),
        "cos": np.ones((4, 64), np.float16),
        "sin": np.ones((4, 64), np.float16),
        "k_cache": np.zeros((4, 8, 1, 64), np.int8),
        "v_cache": np.zeros((4, 8, 1, 64), np.int8),
        "indices": np.zeros(4, np.int32),
        "scale_k": np.ones(64, np.float32),
        "scale_v": np.ones(64, np.float32),
        "weight_scale": np.ones(192, np.float32),
        "bias": jnp.ones(192, bias_dtype),
    }
    codes = {"float32": FLOAT, "float16": FLOAT16, "bfloat16": BF16, "int32": INT32}
    wanted = descriptor(codes[jnp.dtype(bias_dtype).name], [192])
    assert received(standin, "contiguous", False, inputs)["bias"] == wanted


def test_row_dimensions_are_flattened_in_the_descriptor(standin):
    """A cache of many layers, under vmap: [2, 3, 4, 8, 1, 64] is 24 blocks of 8 rows."""
    absent = jnp.zeros((0,), jnp.float32)
    cache = (2, 3, 4, 8, 1, 64)
    operands = Operands(
        x=jnp.ones((2, 5, 192), jnp.float16), cos=jnp.ones((2, 5, 64), jnp.float16),
        sin=jnp.ones((2, 5, 64), jnp.float16), k_cache=jnp.zeros(cache, jnp.int8),
        v_cache=jnp.zeros(cache, jnp.int8), slots=jnp.full((2, 5), 95, jnp.int32),
        scale_k=jnp.ones((1, 1, 64)), scale_v=jnp.ones((1, 1, 64)), offset_k=absent,
        offset_v=absent, weight_scale=absent, activation_scale=absent, bias=absent,
    )  # fmt: skip
    options = WriteOptions("ffi", kv_output=False, indices_mode="drop")
    result = primitive.bind(operands, options)
    assert result[3].shape == cache
    changed = np.asarray(result[4]).any((-1, -2)).reshape(2, 96)
    np.testing.assert_array_equal(np.argwhere(changed), [[0, 95], [1, 95]])
    assert standin.ledger()["descriptors"]["k_cache"]["dims"] == [24, 8, 1, 64]
