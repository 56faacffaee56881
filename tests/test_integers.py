"""Integers that arguments are: Python's and NumPy's of any width are taken alike, a bool never."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_kvcache
from jax_kvcache import BlockAllocator, KVCache, PagedKVCache, slots_from_block_table
from jax_kvcache.checkpoints import read_kv_scales, write_kv_scales

SCALE = np.full((4, 4), 0.1, np.float32)
SCALES = {"scale_k": SCALE, "scale_v": SCALE}
INDICES = np.zeros(2, np.int32)
LENGTHS = np.array([4, 2], np.int32)
RAGGED = np.arange(8, dtype=np.int32).reshape(2, 4)


def attention(window):
    cache = KVCache.create(2, 8, 4, 4, **SCALES)
    return jax_kvcache.decode_attention(jnp.ones((2, 1, 4, 4)), cache, LENGTHS, window=window)


def rope(seq_len):
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    return jax_kvcache.rope_tables(
        RAGGED, 4, dtype=jnp.float32, seq_len=seq_len,
        rope_parameters=parameters | {"max_position_embeddings": 2},
    )  # fmt: skip


def local_slots(rows):
    mesh = jax.make_mesh((1,), ("blocks",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()
    shard = jax.shard_map(
        lambda i: jax_kvcache.local_slots(i, rows, "blocks"),
        mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False,
    )  # fmt: skip
    return shard(INDICES)


def truncated(length):
    """Of 8 rows; what follows is counted from the length that was given."""
    blocks = BlockAllocator(100, 4)
    sequence = blocks.allocate(8)
    blocks.truncate(sequence, length)
    blocks.append(sequence, 300)
    return blocks.length(sequence)


def appended(tokens):
    blocks = BlockAllocator(80, 4)
    sequence = blocks.allocate(300)
    blocks.append(sequence, tokens)
    return blocks.length(sequence), blocks.num_free


def allocated(length):
    blocks = BlockAllocator(100, 4)
    sequence = blocks.allocate(length)
    blocks.append(sequence, 300)
    return blocks.length(sequence), blocks.num_free


def interleaved(size=16, shards=4, head_dim=4):
    w = np.arange(48.0, dtype=np.float32)
    splits = (size, 16, 16)
    return jax_kvcache.interleave_qkv_for_tensor_parallel(w, splits, shards, head_dim=head_dim)


def written_onnxruntime(folder):
    def read(four):
        path = folder / "scales.json"
        scales = {name: np.stack([value]) for name, value in SCALES.items()}
        write_kv_scales(path, scales, "onnxruntime")
        return read_kv_scales(path, num_kv_heads=four)

    return read


# What takes the number 4, by the argument that it is.
CALLS = {
    "batch": lambda four: KVCache.create(four, 8, 4, 4, **SCALES),
    "length": lambda four: KVCache.create(2, four, 4, 4, **SCALES),
    "num_kv_heads": lambda four: KVCache.create(2, 8, four, 4, **SCALES),
    "head_dim": lambda four: KVCache.create(2, 8, 4, four, **SCALES),
    "layers": lambda four: KVCache.create(2, 8, 4, 4, layers=four, **SCALES),
    "num_q_heads": lambda four: KVCache.create(2, 8, 4, 4, num_q_heads=four, **SCALES),
    "num_blocks": lambda four: PagedKVCache.create(four, 8, 4, 4, **SCALES),
    "block_size of slots": lambda four: slots_from_block_table(RAGGED, RAGGED, four),
    "window": attention,
    "seq_len": rope,
    "rows": local_slots,
    "num_blocks of an allocator": lambda four: BlockAllocator(four, 2).num_free,
    "block_size of an allocator": lambda four: BlockAllocator(2, four).allocate(8),
    "length of allocate": allocated,
    "length of truncate": truncated,
    "tokens": appended,
    "size_splits": lambda four: interleaved(size=four * type(four)(4)),
    "shards": lambda four: interleaved(shards=four),
    "head_dim of interleave": lambda four: interleaved(head_dim=four),
}


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint64])
@pytest.mark.parametrize("name", CALLS)
def test_numpys_are_pythons(name, dtype):
    expected, got = CALLS[name](4), CALLS[name](dtype(4))
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "size_splits"])
@pytest.mark.parametrize("value", [True, np.True_, 4.0, np.float32(4), "4"])
def test_nothing_else_is_an_integer(name, value):
    with pytest.raises(TypeError, match=f"`{name.split()[0]}` must be an int, got "):
        CALLS[name](value)


@pytest.mark.parametrize("value", [True, np.True_, 16.0, "16", None])
def test_nothing_else_is_a_width(value):
    with pytest.raises(TypeError, match="`size_splits` must be three ints"):
        interleaved(size=value)


def test_num_kv_heads_of_a_file(tmp_path):
    read = written_onnxruntime(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, read(np.int8(4)), read(4))
    with pytest.raises(ValueError, match="`num_kv_heads` must be an int above 0, got True"):
        read(True)
