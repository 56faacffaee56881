"""The decoder on a paged cache: the logits of a ragged batch are those of each text by itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import checkpoint_folder, decoding
from support.modes import MODES

from jax_kvcache import BlockAllocator, PagedKVCache, checkpoints
from jax_kvcache.model import forward, new_cache, new_paged_cache

# Heads with norms; biases and offsets; a sliding window of 8.
FOLDERS = ("qwen3_ascendv1_dynamic", "qwen2_ascendv1_static", "mistral_float")
BLOCKS, BLOCK, COLUMNS = 12, 4, 4
TEXTS = [list(range(3, 14)), list(range(40, 45))]
IN_FIRST_STEP = (7, 2)


@functools.cache
def load(name):
    """A model with scales."""
    model = checkpoints.load(checkpoint_folder.FOLDERS / name, progress=False)
    if model.cache_params is not None:
        return model
    config = model.config
    scale = jnp.full((config.n_layers, config.n_kv_heads, config.head_dim), 0.02, jnp.float32)
    return dataclasses.replace(model, cache_params={"scale_k": scale, "scale_v": scale})


def in_two_steps(model, columns=(COLUMNS, COLUMNS), rows=None):
    """[S, vocab] logits of each text, read in two steps of a batch of three; and the cache."""
    cache, allocator = new_paged_cache(model, BLOCKS, BLOCK), BlockAllocator(BLOCKS, BLOCK)
    allocator.allocate(5)  # so that the texts do not have the first blocks
    sequences, logits = [allocator.allocate() for _ in TEXTS], [[] for _ in TEXTS]
    step = jax.jit(functools.partial(forward, table_dtype=jnp.float32, rows=rows))
    parts = ([t[:n] for t, n in zip(TEXTS, IN_FIRST_STEP, strict=True)],
             [t[n:] for t, n in zip(TEXTS, IN_FIRST_STEP, strict=True)])  # fmt: skip
    for new, M in zip(parts, columns, strict=True):
        counts = dict(zip(sequences, map(len, new), strict=True))
        batch = allocator.append_batch(counts, batch=3, steps=8, columns=M)
        tokens = np.zeros_like(batch.positions)
        tokens[batch.positions >= 0] = np.concatenate(new)
        got, cache = step(model, tokens, cache, batch.positions, block_table=batch.block_table)
        for text, row, count in zip(logits, np.asarray(got), counts.values(), strict=False):
            text.append(row[:count])
    return [np.concatenate(text) for text in logits], cache, allocator


@pytest.mark.parametrize("name", FOLDERS)
def test_a_ragged_batch_is_its_texts(name):
    model = load(name)
    got, cache, allocator = in_two_steps(model)
    used = {block for sequence in allocator.sequences[1:] for block in allocator.blocks(sequence)}
    for text, logits, sequence in zip(TEXTS, got, allocator.sequences[1:], strict=True):
        expected, contiguous = decoding.at_once(model, text)
        assert decoding.largest_error(logits, expected) < 2e-2  # a code may flip
        blocks = np.asarray(cache.k_cache)[:, list(allocator.blocks(sequence))]
        codes = blocks.reshape(len(blocks), -1, *blocks.shape[3:])[:, : len(text)]
        difference = codes.astype(int) - np.asarray(contiguous.k_cache)[:, 0]
        assert np.abs(difference).max() <= 1
        assert (difference != 0).mean() < 0.01
    assert not np.asarray(cache.k_cache)[:, sorted(set(range(BLOCKS)) - used)].any()


@pytest.mark.parametrize("mode", ["x64", "strict_promotion", "rank_promotion_raises"])
def test_mode(mode):
    expected, *_ = in_two_steps(load(FOLDERS[0]))
    with MODES[mode]():
        got, cache, _ = in_two_steps(load(FOLDERS[0]))
    assert cache.k_cache.dtype == jnp.int8
    for logits, right in zip(got, expected, strict=True):
        assert decoding.largest_error(logits, right) < 2e-2


def test_the_longest_text_is_that_of_the_table(monkeypatch):
    """RoPE of the types dynamic and longrope is made for it."""
    model, longest = load(FOLDERS[0]), []
    tables = forward.__globals__["rope_tables"]

    def recording(*args, seq_len, **options):
        longest.append(seq_len)
        return tables(*args, seq_len=seq_len, **options)

    monkeypatch.setitem(forward.__globals__, "rope_tables", recording)
    in_two_steps(model)
    assert set(longest) == {COLUMNS * BLOCK}


DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}


def load_dynamic(folder):
    """A model with scales and RoPE of type dynamic, whose frequencies change from 8 rows on."""
    copy = checkpoint_folder.Copy("mistral_float")
    copy.config |= {"rope_parameters": DYNAMIC, "max_position_embeddings": 8}
    model = checkpoints.load(copy.write(folder), progress=False)
    return dataclasses.replace(model, cache_params=load("mistral_float").cache_params)


def test_columns_that_change(tmp_path):
    """`rows` keeps the RoPE, which else is made for the columns of each step."""
    model = load_dynamic(tmp_path / "folder")
    expected, *_ = in_two_steps(model)
    for columns in ((3, 5), (4, 8)):
        own, *_ = in_two_steps(model, columns, rows=COLUMNS * BLOCK)
        jax.tree.map(np.testing.assert_array_equal, own, expected)
        own, *_ = in_two_steps(model, columns)
        assert decoding.largest_error(own[0], expected[0]) > 0.1


@pytest.mark.parametrize("has_scales", [True, False])
def test_rows_of_a_contiguous_cache(has_scales, tmp_path):
    """A cache of more rows than RoPE is made for: as one with these rows."""
    model = load_dynamic(tmp_path / "folder")
    model = model if has_scales else dataclasses.replace(model, cache_params=None)
    tokens, start = jnp.asarray(TEXTS[:1], jnp.int32), jnp.zeros(1, jnp.int32)
    expected, _ = forward(model, tokens, new_cache(model, 1, 16), start)
    own, _ = forward(model, tokens, new_cache(model, 1, 64), start, rows=16)
    np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-5)
    other, _ = forward(model, tokens, new_cache(model, 1, 64), start)
    assert decoding.largest_error(np.asarray(other), np.asarray(expected)) > 0.05


def test_new_paged_cache():
    model = load(FOLDERS[0])
    cache, config = new_paged_cache(model, BLOCKS, BLOCK), model.config
    assert isinstance(cache, PagedKVCache)
    heads, head_dim = config.n_kv_heads, config.head_dim
    assert cache.k_cache.shape == (config.n_layers, BLOCKS, BLOCK, heads, head_dim)
    assert cache.num_q_heads == config.n_q_heads
    np.testing.assert_array_equal(cache.scale_v, model.cache_params["scale_v"])


TOKENS, POSITIONS, TABLE = (jnp.zeros(shape, jnp.int32) for shape in ((2, 3), (2, 3), (2, 4)))


@pytest.mark.parametrize(
    ("positions", "table", "error", "message"),
    [
        (POSITIONS, None, TypeError, "`block_table` is required for a PagedKVCache"),
        (POSITIONS, TABLE[:1], ValueError, r"`block_table` .* \[B, M\] = \[2, any\], got \[1, 4\]"),
        (POSITIONS[:, 0], TABLE, TypeError, "`positions` must be 2-D, got 1-D"),
        (POSITIONS[:, :2], TABLE, ValueError, r"`positions` .* \[B, S\] = \[2, 3\], got \[2, 2\]"),
    ],
)
def test_refuses_calls(positions, table, error, message):
    model = load(FOLDERS[0])
    with pytest.raises(error, match=message):
        forward(model, TOKENS, new_paged_cache(model, 2, 2), positions, block_table=table)


@pytest.mark.parametrize(("has_scales", "kind"), [(True, "KVCache"), (False, "FloatCache")])
def test_refuses_a_table_for_another_cache(has_scales, kind):
    model = load(FOLDERS[0])
    model = model if has_scales else dataclasses.replace(model, cache_params=None)
    with pytest.raises(TypeError, match=f"`block_table` must be None for a {kind}: only a Paged"):
        forward(model, TOKENS, new_cache(model, 2, 8), POSITIONS[:, 0], block_table=TABLE)


def test_refuses_a_model_without_scales():
    model = dataclasses.replace(load(FOLDERS[0]), cache_params=None)
    with pytest.raises(ValueError, match="`model` must have `cache_params`, got None: calibrate"):
        new_paged_cache(model, 2, 2)
