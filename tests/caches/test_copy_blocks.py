"""PagedKVCache.copy_blocks against NumPy, in place, and over several devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import caches, hlo

BLOCKS, L = caches.BLOCKS, caches.L
INT32 = caches.INT32
PAIRS = {
    "none": [],
    "one": [(2, 5)],
    "skipped": [(-1, -1), (2, -1), (-1, 3), (BLOCKS, 1), (1, BLOCKS)],
    "far away": [(INT32.max, 0), (0, INT32.max), (INT32.min, 0), (0, INT32.min)],
    "a pair sees what those before it wrote": [(1, 2), (2, 3), (0, 1), (6, 1)],
    "itself": [(4, 4)],
    "skipped between others": [(-1, -1), (1, 2), (-1, 0), (2, 3), (0, BLOCKS), (3, 5), (4, -1)],
}  # fmt: skip
copy = jax.jit(lambda cache, pairs: cache.copy_blocks(*pairs.T), donate_argnums=0)


def filled(layers):
    """A cache with random codes."""
    rng = np.random.default_rng(0)
    cache = caches.make("paged", rng, layers=layers, offsets=True)
    k, v = rng.integers(-128, 128, (2, *cache.k_cache.shape), np.int8)
    return dataclasses.replace(cache, k_cache=jnp.array(k), v_cache=jnp.array(v))


def expected(codes, pairs):
    codes = np.array(codes)
    for source, destination in pairs:
        if 0 <= source < BLOCKS and 0 <= destination < BLOCKS:
            codes[..., destination, :, :, :] = codes[..., source, :, :, :]
    return codes


@pytest.mark.parametrize("layers", [None, L])
@pytest.mark.parametrize("name", PAIRS)
def test_copies_are_numpys(name, layers):
    cache, pairs = filled(layers), np.array(PAIRS[name], np.int32).reshape(-1, 2)
    wanted = [expected(codes, pairs) for codes in (cache.k_cache, cache.v_cache)]
    rest = jax.tree.map(np.asarray, (cache.scale_k, cache.offset_v))
    after = copy(cache, pairs)
    np.testing.assert_array_equal([after.k_cache, after.v_cache], wanted)
    jax.tree.map(np.testing.assert_array_equal, (after.scale_k, after.offset_v), rest)
    assert after.layers == layers


@pytest.mark.parametrize("layers", [None, L])
def test_in_place(layers):
    cache, pairs = filled(layers), np.array([(1, 2), (3, 0)], np.int32)
    compiled = copy.lower(cache, pairs).compile()
    elements = cache.k_cache.size
    hlo.assert_in_place(compiled, elements)
    assert compiled.memory_analysis().temp_size_in_bytes < elements
    pointers = [a.unsafe_buffer_pointer() for a in (cache.k_cache, cache.v_cache)]
    after = compiled(cache, pairs)
    assert pointers == [a.unsafe_buffer_pointer() for a in (after.k_cache, after.v_cache)]


def over_devices(kind, spec):
    """The layered cache with its codes spread over two devices, and its mesh."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
    cache = filled(L)
    codes = NamedSharding(mesh, spec)
    heads = NamedSharding(mesh, P(None, *spec[3:]))
    place = lambda leaf: jax.device_put(leaf, codes if leaf.ndim == 5 else heads)  # noqa: E731
    return jax.tree.map(place, cache), mesh


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_heads_move_nothing(kind):
    pairs = np.array(PAIRS["a pair sees what those before it wrote"], np.int32)
    cache, mesh = over_devices(kind, P(None, None, None, "d"))
    wanted = expected(cache.k_cache, pairs)
    with jax.set_mesh(mesh):
        compiled = copy.lower(cache, pairs).compile()
        np.testing.assert_array_equal(compiled(cache, pairs).k_cache, wanted)
    hlo.assert_in_place(compiled, cache.k_cache.size // 2)
    assert "all-" not in compiled.as_text()


@pytest.fixture
def compiled_programs():
    """Grows by one entry with every program that XLA compiles."""
    made = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            made.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield made
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("kind", [None, AxisType.Auto, AxisType.Explicit], ids=str)
def test_eager_calls_compile_once(kind, compiled_programs):
    cache = filled(L) if kind is None else over_devices(kind, P(None, None, None, "d"))[0]
    wanted = expected(cache.k_cache, [(1, 2), (3, 0)])
    sources, destinations = np.array([(1, 2), (3, 0)], np.int32).T
    cache.copy_blocks(sources, destinations)
    before = len(compiled_programs)
    for _ in range(3):
        after = cache.copy_blocks(sources, destinations)
    assert before > 0
    assert len(compiled_programs) == before
    np.testing.assert_array_equal(after.k_cache, wanted)


def test_inside_shard_map():
    pairs = np.array([(1, 2), (2, 3)], np.int32)
    cache, mesh = over_devices(AxisType.Auto, P(None, None, None, "d"))
    wanted = expected(cache.k_cache, pairs)
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, cache)
    sharded = jax.shard_map(
        lambda cache, pairs: cache.copy_blocks(*pairs.T),
        mesh=mesh, in_specs=(specs, P()), out_specs=specs,
    )  # fmt: skip
    after = jax.jit(sharded, donate_argnums=0)(cache, pairs)
    np.testing.assert_array_equal(after.k_cache, wanted)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0], [1, 2]), ValueError, r"`destinations` must have shape \[N\] = \[1\], got \[2\]"),
        (([[0]], [[1]]), TypeError, r"`sources` must be 1-D, got 2-D \[1, 1\]"),
        (([0.5], [1]), TypeError, "`sources` must have dtype int32, got float64"),
        ((None, [1]), TypeError, "`sources` is required, got None"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        filled(None).copy_blocks(*arguments)


def test_skipped_pairs_are_no_steps_of_the_loop():
    """A decoding step has a pair for every sequence, and nearly all of them are skipped."""
    text = copy.lower(filled(L), np.full((256, 2), -1, np.int32)).compile().as_text()
    assert " while(" in text
    assert "known_trip_count" not in text


def stacked(*caches):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)


# As many pairs for each example, of which one, three, none and four are copied.
OF_EXAMPLES = np.array(
    [
        [(1, 2), (-1, -1), (-1, 0), (9, 0)],
        [(-1, -1), (1, 2), (2, 3), (0, 1)],
        [(-1, 3), (-1, -1), (BLOCKS, 1), (2, -1)],
        [(3, 0), (0, 5), (5, 1), (4, 4)],
    ],
    np.int32,
)


@pytest.mark.parametrize("over", ["both", "caches", "pairs"])
def test_under_vmap(over):
    one = filled(L)
    cache = one if over == "pairs" else stacked(*[one] * len(OF_EXAMPLES))
    pairs = OF_EXAMPLES[1] if over == "caches" else OF_EXAMPLES
    in_axes = (None if over == "pairs" else 0, None if over == "caches" else 0)
    after = jax.vmap(lambda cache, pairs: cache.copy_blocks(*pairs.T), in_axes)(cache, pairs)
    for i in range(len(OF_EXAMPLES)):
        of_one = pairs if over == "caches" else pairs[i]
        np.testing.assert_array_equal(after.k_cache[i], expected(one.k_cache, of_one))
        np.testing.assert_array_equal(after.v_cache[i], expected(one.v_cache, of_one))


@pytest.mark.parametrize(
    "layers",
    [
        None,
        pytest.param(
            L,
            marks=pytest.mark.skipif(
                jax.__version_info__ < (0, 10), reason="this XLA puts the blocks before the layers"
            ),
        ),
    ],
)
def test_under_two_vmaps_in_place(layers):
    """No whole cache is copied, or selected, for an example that has fewer pairs than another."""
    one = filled(layers)
    cache = stacked(*[stacked(one, one)] * 2)
    pairs = OF_EXAMPLES.reshape(2, 2, 4, 2)
    twice = jax.vmap(jax.vmap(lambda cache, pairs: cache.copy_blocks(*pairs.T)))
    compiled = jax.jit(twice, donate_argnums=0).lower(cache, pairs).compile()
    hlo.assert_in_place(compiled, cache.k_cache.size)
    assert compiled.memory_analysis().temp_size_in_bytes < cache.k_cache.size
    after = compiled(cache, pairs)
    for i in np.ndindex(2, 2):
        np.testing.assert_array_equal(after.k_cache[i], expected(one.k_cache, pairs[i]))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_under_vmap_over_devices(kind):
    cache, mesh = over_devices(kind, P(None, None, None, "d"))
    wanted = [expected(cache.k_cache, pairs) for pairs in OF_EXAMPLES]
    examples = jax.vmap(lambda cache, pairs: cache.copy_blocks(*pairs.T), (None, 0))
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(examples(cache, OF_EXAMPLES).k_cache, wanted)


def test_in_a_scan_in_place():
    cache = filled(L)
    wanted = functools.reduce(expected, OF_EXAMPLES, cache.k_cache)

    def steps(cache, pairs):
        return jax.lax.scan(lambda c, p: (c.copy_blocks(*p.T), None), cache, pairs)[0]

    compiled = jax.jit(steps, donate_argnums=0).lower(cache, OF_EXAMPLES).compile()
    hlo.assert_in_place(compiled, cache.k_cache.size)
    np.testing.assert_array_equal(compiled(cache, OF_EXAMPLES).k_cache, wanted)
