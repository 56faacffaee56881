"""Donated caches are written in place: no copy and no temporary of a cache's size, one buffer."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from support import calls, hlo

from jax_kvcache import dequant_rope_quant_kvcache

SHAPES = [  # B, S, Nq, Nkv, D, C1, C2
    (320, 1, 8, 1, 128, 320, 1280),
    (320, 1, 8, 1, 128, 512, 128),
    (32, 1, 32, 8, 128, 32, 2048),
    (1, 1, 32, 8, 128, 1, 2048),
    (1, 1024, 8, 2, 128, 1, 2048),
    (64, 1, 16, 2, 64, 64, 333),
]
NAMES = ("B", "S", "Nq", "Nkv", "D", "C1", "C2")
SMALL = dict(zip(NAMES, (4, 1, 4, 2, 64, 4, 4096), strict=True))


def compile_step(function, **call):
    return jax.jit(function, donate_argnames=("k_cache", "v_cache")).lower(**call).compile()


def vmapped(function, call, levels):
    """The function and its arguments' shapes under so many levels of vmap."""
    for size in (2, 3)[:levels]:
        function = jax.vmap(function)
        call = {k: jax.ShapeDtypeStruct((size, *v.shape), v.dtype) for k, v in call.items()}
    return function, call


def elements(call):
    return math.prod(call["k_cache"].shape)


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("x_dtype", [jnp.int32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("cache_mode", ["contiguous", "page"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step(shape, cache_mode, x_dtype, implementation):
    sizes = dict(zip(NAMES, shape, strict=True))
    function = functools.partial(
        dequant_rope_quant_kvcache,
        cache_mode=cache_mode,
        kv_output=True,
        implementation=implementation,
    )
    temporaries = []
    for factor in (1, 4) if x_dtype == jnp.int32 else (1,):
        sizes["C2"] = shape[-1] * factor
        call = calls.arguments(**sizes, x_dtype=x_dtype, cache_mode=cache_mode)
        compiled = compile_step(function, **call)
        hlo.assert_in_place(compiled, elements(call))
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    # A temporary that does not grow with the cache is not the cache.
    assert temporaries[-1] - temporaries[0] < elements(call) // 100


def test_the_obvious_write_is_seen_as_a_copy():
    """The check can fail: this is how jnp code is usually written."""

    def obvious(k_cache, v_cache, slots, rows):
        flat = k_cache.reshape(-1, *k_cache.shape[2:]).at[slots].set(rows)
        return flat.reshape(k_cache.shape), v_cache

    cache = jax.ShapeDtypeStruct((320, 1280, 1, 128), jnp.int8)
    compiled = compile_step(
        obvious,
        k_cache=cache,
        v_cache=cache,
        slots=jax.ShapeDtypeStruct((320,), jnp.int32),
        rows=jax.ShapeDtypeStruct((320, 1, 128), jnp.int8),
    )
    with pytest.raises(AssertionError):
        hlo.assert_in_place(compiled, math.prod(cache.shape))


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="this XLA copies two of the results")
@pytest.mark.parametrize("cache_mode", ["contiguous", "page"])
def test_results_of_the_reference_are_not_copied(cache_mode):
    """XLA may choose another layout where a dimension of size 1 is added, and copy to undo it."""
    function = functools.partial(
        dequant_rope_quant_kvcache, cache_mode=cache_mode, kv_output=True, implementation="xla"
    )
    text = compile_step(function, **calls.arguments(**SMALL, cache_mode=cache_mode)).as_text()
    assert "concatenate" in text, "the text is not that of the reference"
    (results,) = re.findall(r"ROOT .* tuple\((.*?)\)", text[text.index("ENTRY") :])
    assert "copy" not in results


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("cache_mode", ["contiguous", "page"])
def test_scan(cache_mode, implementation):
    call = calls.ones(**SMALL, cache_mode=cache_mode)
    k_cache, v_cache = call.pop("k_cache"), call.pop("v_cache")

    def decode(k_cache, v_cache):
        def step(caches, i):
            result = dequant_rope_quant_kvcache(
                **call | {"indices": call["indices"] + i}, k_cache=caches[0], v_cache=caches[1],
                cache_mode=cache_mode, implementation=implementation,
            )  # fmt: skip
            return (result.k_cache, result.v_cache), result.q

        return jax.lax.scan(step, (k_cache, v_cache), jnp.arange(16, dtype=jnp.int32))

    compiled = compile_step(decode, k_cache=k_cache, v_cache=v_cache)
    hlo.assert_in_place(compiled, k_cache.size)
    assert compiled.memory_analysis().temp_size_in_bytes < k_cache.size // 10


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("cache_mode", ["contiguous", "page"])
def test_vmap(cache_mode, levels, implementation):
    function = functools.partial(
        dequant_rope_quant_kvcache, cache_mode=cache_mode, implementation=implementation
    )
    call = calls.arguments(**SMALL, cache_mode=cache_mode)
    function, call = vmapped(function, call, levels)
    compiled = compile_step(function, **call)
    hlo.assert_in_place(compiled, elements(call))
    assert compiled.memory_analysis().temp_size_in_bytes < elements(call) // 10


@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize("tokens", [(1, 1), (4, 1), (1, 4), (4, 4)], ids=str)
@pytest.mark.parametrize("cache_mode", ["contiguous", "page"])
def test_native_call_copies_nothing(cache_mode, tokens, levels):
    """Around the native call there is at most one fusion: the slots of several tokens."""
    B, S = tokens
    function = functools.partial(
        dequant_rope_quant_kvcache, cache_mode=cache_mode, kv_output=True, implementation="ffi"
    )
    call = calls.arguments(**SMALL | {"B": B, "S": S, "C1": B}, cache_mode=cache_mode)
    function, call = vmapped(function, call, levels)
    text = compile_step(function, **call).as_text()
    assert re.findall(r" (?:copy|transpose)\(.*", text) == []
    assert text.count(" fusion(") == (cache_mode == "contiguous" and S > 1)


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
def test_buffers_stay_the_same(implementation):
    call = calls.ones(**SMALL)
    step = jax.jit(
        functools.partial(dequant_rope_quant_kvcache, implementation=implementation),
        donate_argnames=("k_cache", "v_cache"),
    )
    before = [call[name].unsafe_buffer_pointer() for name in ("k_cache", "v_cache")]
    for _ in range(3):
        result = step(**call)
        assert call["k_cache"].is_deleted()
        call |= {"k_cache": result.k_cache, "v_cache": result.v_cache}
    after = [call[name].unsafe_buffer_pointer() for name in ("k_cache", "v_cache")]
    assert before == after


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
def test_undonated_caches_keep_their_data(implementation):
    call = calls.ones(**SMALL)
    result = jax.jit(functools.partial(dequant_rope_quant_kvcache, implementation=implementation))(
        **call
    )
    assert not call["k_cache"].is_deleted()
    assert (call["k_cache"] == 1).all()
    assert (result.k_cache != 1).any()


def test_a_wrong_call_leaves_donated_caches_alive():
    call = calls.ones(**SMALL)
    step = jax.jit(dequant_rope_quant_kvcache, donate_argnames=("k_cache", "v_cache"))
    with pytest.raises(ValueError, match="scale_k"):
        step(**call | {"scale_k": jnp.ones((3, 64))})
    assert not call["k_cache"].is_deleted()
    assert not call["v_cache"].is_deleted()


def test_one_array_cannot_be_donated_twice():
    """The eager check sees one array; under jit it is JAX that refuses to donate it twice."""
    call = calls.ones(**SMALL)
    call["v_cache"] = call["k_cache"]
    step = jax.jit(dequant_rope_quant_kvcache, donate_argnames=("k_cache", "v_cache"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="donate the same buffer twice"):
        step(**call)
