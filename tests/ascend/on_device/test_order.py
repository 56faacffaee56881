"""Calls return before the device works, run in order on a stream, and from many threads at once."""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from support import calls, oracle
from support.results import assert_results

from jax_kvcache import dequant_rope_quant_kvcache

SIZES = {"S": None, "Nq": 2, "Nkv": 1, "D": 64, "C2": 8}

operator = functools.partial(dequant_rope_quant_kvcache, implementation="ffi", kv_output=True)


def draw(seed, B):
    call = calls.drawn(seed, **SIZES, B=B, C1=B)
    rng = np.random.default_rng(seed)
    return call | {"indices": rng.integers(-1, SIZES["C2"], B).astype(np.int32)}


def check(result, call):
    assert_results(result, oracle.dequant_rope_quant_kvcache(**call, kv_output=True))


def test_asynchronous_and_ordered(standin):
    call = draw(0, 2)
    step = jax.jit(operator, donate_argnames=("k_cache", "v_cache"))
    caches = {name: jnp.asarray(call.pop(name)) for name in ("k_cache", "v_cache")}
    for _ in range(5):
        result = step(**call, **caches)
        caches = {"k_cache": result.k_cache, "v_cache": result.v_cache}
    jax.block_until_ready(result)
    one = ("launch {} on 0", "return {}", "execute {}")
    assert standin.ledger()["events"] == [event.format(i) for i in range(5) for event in one]


def test_one_call_can_launch_many_before_any_runs(standin):
    """Two calls in one computation, neither of which needs the other."""
    first, second = draw(0, 2), draw(1, 2)
    results = jax.jit(lambda a, b: (operator(**a), operator(**b)))(first, second)
    check(results[0], first)
    check(results[1], second)
    assert standin.launches == 2


@pytest.mark.ascend_device
def test_threads(launches):
    num_threads, num_calls = 4, 10
    function = jax.jit(operator)
    function.lower(**draw(0, 2)).compile()

    def work(thread):
        for i in range(num_calls):
            call = draw(100 * thread + i, 2)
            check(function(**call), call)

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, range(num_threads)))
    assert launches() in (num_threads * num_calls, None)


def spread(call, axis_type):
    """The call's arrays over eight devices, and their specs."""
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(axis_type,))
    assert mesh.size == 8
    whole = ("scale_k", "scale_v", "weight_scale")
    specs = {name: PartitionSpec() if name in whole else PartitionSpec("data") for name in call}
    arrays = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in call.items()}
    return mesh, arrays, specs


def test_eight_devices_at_once(standin):
    call = draw(7, 16)
    mesh, arrays, specs = spread(call, AxisType.Auto)

    def function(**call):
        local = jax.shard_map(
            lambda call: operator(**call),
            mesh=mesh,
            in_specs=(specs,),
            out_specs=PartitionSpec("data"),
        )
        return local(call)

    step = jax.jit(function, donate_argnames=("k_cache", "v_cache"))
    first = step(**arrays)
    check(first, call)
    caches = {"k_cache": first.k_cache, "v_cache": first.v_cache}
    addresses = [s.data.unsafe_buffer_pointer() for s in first.k_cache.addressable_shards]
    second = jax.block_until_ready(step(**arrays | caches))
    after = [s.data.unsafe_buffer_pointer() for s in second.k_cache.addressable_shards]
    assert after == addresses
    events = standin.ledger()["events"]
    assert {e.split(" on ")[1] for e in events if " on " in e} == set("01234567")
    assert standin.launches == 16


def test_eight_devices_on_an_explicit_mesh(standin):
    call = draw(8, 16)
    mesh, arrays, _ = spread(call, AxisType.Explicit)
    with jax.set_mesh(mesh):
        check(jax.jit(operator)(**arrays), call)
    assert standin.launches == 8


def test_automatic_partitioning_is_refused(standin):
    """A plugin outside XLA has no custom partitioning: an error that says what to do instead."""
    _, arrays, _ = spread(draw(9, 16), AxisType.Auto)
    with pytest.raises(NotImplementedError, match=r"Use explicit mesh axes .* or jax.shard_map"):
        jax.jit(operator)(**arrays)
