"""What decode_attention refuses, with its messages."""

import numpy as np
import pytest
from support.attention_calls import B, D, L, Nq, S, make

from jax_kvcache import decode_attention


def refused():
    rng = np.random.default_rng(0)
    flat, _ = make("contiguous", rng)
    paged, table = make("paged", rng)
    layered, _ = make("contiguous", rng, layers=L)
    q, lengths = np.zeros((B, S, Nq, D), np.float32), np.zeros(B, np.int32)
    wide = np.zeros((B + 1, S, Nq, D), np.float32)
    return [
        (TypeError, "`cache` must be a KVCache or a PagedKVCache, got dict", (q, {}, lengths), {}),
        (
            TypeError,
            "`q` must have dtype .* got int32",
            (q.astype(np.int32), flat, lengths),
            {},
        ),
        (TypeError, r"`q` must be 4-D, got 3-D \[3, 2, 4\]", (q[..., 0], flat, lengths), {}),
        (ValueError, r"D = 16 .* Nkv = 2, got \[3, 2, 4, 8\]", (q[..., :8], flat, lengths), {}),
        (ValueError, r"Nkv = 2, got \[3, 2, 3, 16\]", (q[:, :, :3], flat, lengths), {}),
        (
            TypeError,
            "`lengths` must have dtype int32, got float",
            (q, flat, lengths * 1.0),
            {},
        ),
        (ValueError, "`lengths` must have one entry per .* = 3, got 2", (q, flat, lengths[:2]), {}),
        (
            ValueError,
            "as many sequences as the cache = 3, got 4",
            (wide, flat, np.zeros(4, np.int32)),
            {},
        ),
        (TypeError, "`layer` must be None", (q, flat, lengths), {"layer": 0}),
        (TypeError, "`layer` is required for a cache with 2 layers", (q, layered, lengths), {}),
        (
            TypeError,
            "`layer` must be an integer scalar, got ",
            (q, layered, lengths),
            {"layer": 0.0},
        ),
        (
            TypeError,
            "`block_table` must be None for a KVCache",
            (q, flat, lengths),
            {"block_table": table},
        ),
        (TypeError, "`block_table` is required", (q, paged, lengths), {}),
        (
            TypeError,
            "`block_table` must be 2-D, got 1-D",
            (q, paged, lengths),
            {"block_table": table[0]},
        ),
        (
            ValueError,
            "`block_table` must have one entry .* = 3, got 2",
            (q, paged, lengths),
            {"block_table": table[:2]},
        ),
        (
            ValueError,
            "`block_table` must have at least one column",
            (q, paged, lengths),
            {"block_table": table[:, :0]},
        ),
    ]


@pytest.mark.parametrize(("error", "message", "arguments", "options"), refused())
def test_refuses(error, message, arguments, options):
    with pytest.raises(error, match=message):
        decode_attention(*arguments, **options)


@pytest.mark.parametrize("scale", [[5.0], "a", 1j])
def test_scale_is_a_number(scale):
    cache, _ = make("contiguous", np.random.default_rng(0))
    q, lengths = np.ones((B, S, Nq, D), np.float32), np.zeros(B, np.int32)
    with pytest.raises(TypeError, match="`scale` must be a real number, got"):
        decode_attention(q, cache, lengths, scale=scale)
