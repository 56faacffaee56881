"""Hostile calls straight to the native CPU target: INVALID_ARGUMENT with names, never a crash."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import calls, native_calls
from support.internals import Operands

# B = 2 groups, T = 3 tokens, Nq = 2, Nkv = 1, D = 8, 4 rows each, every optional present.
SIZES = dict(B=2, S=3, Nq=2, Nkv=1, D=8, C1=2, C2=4)
FLOAT32 = jnp.float32


def valid(x_dtype=jnp.int32) -> Operands:
    operands = native_calls.canonical(calls.ones(**SIZES, x_dtype=x_dtype))
    if x_dtype != jnp.int32:
        return operands
    return operands._replace(
        offset_k=jnp.ones((1, 1, 8)),
        offset_v=jnp.ones((1, 1, 8)),
        activation_scale=jnp.ones((2, 3)),
        bias=jnp.ones((1, 32)),
    )


def refused(operands, message, results=None, kv_output=False, **options):
    results = native_calls.results_of(valid(), kv_output) if results is None else results
    with pytest.raises(jax.errors.JaxRuntimeError, match=message) as caught:
        native_calls.call(operands, results, kv_output=kv_output, **options)
    text = str(caught.value)
    assert text.startswith("INVALID_ARGUMENT")
    assert "dequant_rope_quant_kvcache: `" in text


@pytest.mark.parametrize("kv_output", [False, True])
@pytest.mark.parametrize(("x_dtype", "y", "offset"), [(jnp.int32, 2, 1), (jnp.float16, 1, 0)])
def test_the_valid_calls_run(x_dtype, y, offset, kv_output):
    """Of ones: y is 1, or 1 * 1 * 1 plus the bias; rotating by cos = sin = 1 gives y - y, y + y."""
    operands = valid(x_dtype)
    results = native_calls.results_of(operands, kv_output)
    q, k, v, k_cache, v_cache = map(
        np.asarray, native_calls.call(operands, results, kv_output=kv_output)
    )
    rotated = np.repeat([0, 2 * y], 4)  # of D = 8
    np.testing.assert_array_equal(q.reshape(2, 3, 2, 8), np.broadcast_to(rotated, (2, 3, 2, 8)))
    if kv_output:
        np.testing.assert_array_equal(k.reshape(2, 3, 8), np.broadcast_to(rotated, (2, 3, 8)))
        np.testing.assert_array_equal(v, np.full(2 * 3 * 8, y))
    np.testing.assert_array_equal(operands.slots, np.tile([1, 2, 3], (2, 1)))  # not row 0
    rows = (2, 3, 1, 8)
    np.testing.assert_array_equal(k_cache[:, 1:], np.broadcast_to(rotated + offset, rows))
    np.testing.assert_array_equal(v_cache[:, 1:], np.full(rows, y + offset))
    for cache in (k_cache, v_cache):
        np.testing.assert_array_equal(cache[:, 0], np.ones((2, 1, 8)))


def refused_with(name, shape, dtype, message):
    """Refused when one operand of the valid call is another array."""
    # JAX itself refuses to alias arrays that differ.
    aliases = {} if name in ("k_cache", "v_cache") else None
    operands = valid()._replace(**{name: array(shape, dtype)})
    refused(operands, message, aliases=aliases)


def array(shape, dtype=FLOAT32):
    return jnp.ones(shape, dtype)


SHAPES = {
    # operand: (a wrong shape, the message)
    "slots rank": ("slots", (), r"`slots` must have rank 1 to 17 \(\[\*g, T\]\), got rank 0"),
    "slots zero": ("slots", (2, 0), r"`slots` must have no dimension of size 0, got \[2, 0\]"),
    "k_cache rank": ("k_cache", (2, 4, 8), r"`k_cache` must have rank 4 or more .*, got rank 3"),
    "k_cache group": (
        "k_cache",
        (3, 4, 1, 8),
        r"`k_cache` must have shape \[\*g.*g = \[2\], got \[3, 4, 1, 8\]",
    ),
    "k_cache no rows": ("k_cache", (2, 0, 1, 8), "`k_cache` must have no dimension of size 0"),
    "k_cache odd": ("k_cache", (2, 4, 1, 7), "`k_cache` must have an even last dimension D, got"),
    "v_cache": ("v_cache", (2, 5, 1, 8), "`v_cache` must have the shape and dtype of `k_cache`"),
    "x rank": ("x", (6, 32), r"`x` must have rank 3 \(\[\*g, T, H\]\), got rank 2"),
    "x tokens": (
        "x",
        (2, 4, 32),
        r"`x` must have shape \[\*g, T, H\] = \[2, 3, 32\], got \[2, 4, ",
    ),
    "x no q": ("x", (2, 3, 16), r"`x` must have H = \(Nq \+ 2\*Nkv\) \* D with Nq >= 1.* H = 16"),
    "x part of a head": ("x", (2, 3, 36), "`x` must have H = .*got H = 36"),
    "x nothing": ("x", (2, 3, 0), "`x` must have no dimension of size 0"),
    "cos": ("cos", (24,), r"`cos` must have shape \[G \* T \* D\] = \[48\], got \[24\]"),
    "sin": ("sin", (2, 3, 8), r"`sin` must have shape \[G \* T \* D\] = \[48\], got \[2, 3, 8\]"),
    "scale_k": (
        "scale_k",
        (3, 1, 8),
        r"`scale_k` must have shape \[\*g', Nkv, D\] = \[2, 1, 8\] \(or 1 for any of g'\), got \[3",
    ),
    "scale_k absent": ("scale_k", (0,), r"`scale_k` must have shape .*, got \[0\]"),
    "scale_v": ("scale_v", (1, 8), r"`scale_v` must have shape .*, got \[1, 8\]"),
    "offset_k": ("offset_k", (1, 2, 8), r"`offset_k` must have shape .*, got \[1, 2, 8\]"),
    "offset_v alone": ("offset_k", (0,), "`offset_k` must be given together with `offset_v`"),
    "offset_k alone": ("offset_v", (0,), "`offset_v` must be given together with `offset_k`"),
    "weight_scale": ("weight_scale", (1, 31), r"`weight_scale` must have shape \[\*g', H\] = "),
    "weight_scale absent": ("weight_scale", (0,), r"`weight_scale` must have shape .*, got \[0\]"),
    "activation_scale": (
        "activation_scale",
        (1, 3),
        r"`activation_scale` must have shape \[\*g, T\] = \[2, 3\]",
    ),
    "bias": ("bias", (2, 1), r"`bias` must have shape \[\*g', H\] = \[2, 32\]"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shape(case):
    name, shape, message = SHAPES[case]
    refused_with(name, shape, getattr(valid(), name).dtype, message)


DTYPES = (
    jnp.bool_, jnp.int8, jnp.int16, jnp.int32, jnp.uint8, jnp.uint32, jnp.float16, jnp.bfloat16,
    jnp.float32, jnp.complex64, jnp.float8_e4m3fn,
)  # fmt: skip
ALLOWED = {
    "x": (jnp.int32, jnp.bfloat16), "cos": (jnp.bfloat16,), "sin": (jnp.bfloat16,),
    "slots": (jnp.int32,), "k_cache": (jnp.int8,), "v_cache": (jnp.int8,),
    "bias": (jnp.float32, jnp.float16, jnp.bfloat16, jnp.int32),
}  # fmt: skip


@pytest.mark.parametrize("name", Operands._fields)
def test_dtype(name):
    """Every dtype in every position, with the others as they are."""
    shape = getattr(valid(), name).shape
    for dtype in DTYPES:
        if dtype not in ALLOWED.get(name, (jnp.float32,)):
            refused_with(name, shape, dtype, r"must have .*dtype.*, got ")


def test_float_x_has_no_dequantisation():
    operands = valid(jnp.float16)
    results = native_calls.results_of(operands, False)
    for name, shape in (("weight_scale", (1, 32)), ("activation_scale", (2, 3)), ("bias", (1, 32))):
        message = rf"`{name}` goes with an int32 `x` only: it must have shape \[0\]"
        refused(operands._replace(**{name: array(shape)}), message, results)


def test_float_x_has_the_tables_dtype():
    operands = valid(jnp.float16)
    operands = operands._replace(x=operands.x.astype(jnp.bfloat16))
    message = "`cos` must have the dtype of `x` unless that is int32, bfloat16, got float16"
    refused(operands, message, native_calls.results_of(operands, False))


@pytest.mark.parametrize("index", range(5))
def test_result(index):
    operands = valid()
    names = ("q", "k", "v", "k_cache result", "v_cache result")
    for shape, dtype in (((2, 3, 2, 6), None), (None, jnp.int16)):
        results = native_calls.results_of(operands, True)
        old = results[index]
        if index > 2 and dtype is None:
            shape = (2, 5, 1, 8)
        results[index] = jax.ShapeDtypeStruct(shape or old.shape, dtype or old.dtype)
        aliases = {i: i for i in (3, 4) if i != index}
        message = rf"`{names[index]}` must have"
        refused(operands, message, results, kv_output=True, aliases=aliases)


def test_k_and_v_are_empty_without_kv_output():
    results = native_calls.results_of(valid(), True)
    refused(valid(), r"`k` must have shape \[0\], got \[48\]", results)


@pytest.mark.parametrize(("index", "name"), [(3, "k_cache"), (4, "v_cache")])
def test_caches_are_aliased(index, name):
    aliases = {i: i for i in (3, 4) if i != index}
    refused(valid(), f"`{name}` must be the memory of its result", aliases=aliases)


@pytest.mark.parametrize("count", [0, 12, 14])
def test_number_of_operands(count):
    operands = (list(valid()) * 2)[:count]
    results = native_calls.results_of(valid(), False)
    with pytest.raises(jax.errors.JaxRuntimeError, match="takes 13 operands and 5 results, got"):
        native_calls.call(operands, results, kv_output=False, aliases={})


@pytest.mark.parametrize("attributes", [{}, {"kv_output": 1.5}, {"kv_output": "yes"}], ids=str)
def test_attribute(attributes):
    """Refused by XLA's own decoding, before the handler's checks."""
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT.*(number|bad operands)"
    ):
        native_calls.call(valid(), native_calls.results_of(valid(), False), **attributes)


def test_any_slot():
    """No slot is an error, and none reaches a row that is not its own."""
    operands = valid()
    wild = [[-1, -(2**31), 4], [2**31 - 1, 5, 3]]
    operands = operands._replace(slots=jnp.asarray(wild, jnp.int32))
    *_, k_cache, v_cache = native_calls.call(
        operands, native_calls.results_of(operands, False), kv_output=False
    )
    for before, after in ((operands.k_cache, k_cache), (operands.v_cache, v_cache)):
        changed = np.argwhere((np.asarray(before) != np.asarray(after)).any((2, 3)))
        np.testing.assert_array_equal(changed, [[1, 3]])
