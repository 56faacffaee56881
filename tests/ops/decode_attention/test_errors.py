"""What decode_attention refuses, with its messages."""

import numpy as np
import pytest
from support.attention_calls import B, D, L, Nq, S, make

from jax_kvcache import decode_attention, merge_attention


def refused():
    rng = np.random.default_rng(0)
    flat, _ = make("contiguous", rng)
    paged, table = make("paged", rng)
    layered, _ = make("contiguous", rng, layers=L)
    q, lengths = np.zeros((B, S, Nq, D), np.float32), np.zeros(B, np.int32)
    positions = np.zeros((B, S), np.int32)
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
        (TypeError, "exactly one of .* must be given, got neither", (q, flat), {}),
        (TypeError, "must be given, got both", (q, flat, lengths), {"positions": positions}),
        (
            TypeError,
            "`positions` must have dtype int32, got float",
            (q, flat),
            {"positions": positions * 1.0},
        ),
        (TypeError, "`positions` must be 2-D, got 1-D", (q, flat), {"positions": lengths}),
        (
            ValueError,
            r"`positions` must have shape \[B, S\] = \[3, 2\], got \[3, 1\]",
            (q, flat),
            {"positions": positions[:, :1]},
        ),
        (
            ValueError,
            "`positions` must fit into int32",
            (q, flat),
            {"positions": [[2**40] * S] * B},
        ),
        (ValueError, "`window` must be at least 1, got 0", (q, flat, lengths), {"window": 0}),
        (TypeError, "`window` must be an int, got 1.5", (q, flat, lengths), {"window": 1.5}),
        (
            ValueError,
            "`soft_cap` must be a normal float32 above 0, got 0",
            (q, flat, lengths),
            {"soft_cap": 0},
        ),
        (ValueError, "above 0, got nan", (q, flat, lengths), {"soft_cap": float("nan")}),
        (ValueError, "above 0, got 1e-40", (q, flat, lengths), {"soft_cap": 1e-40}),
        (ValueError, "above 0, got 1e.39", (q, flat, lengths), {"soft_cap": 1e39}),
        (ValueError, "above 0, got 1000000", (q, flat, lengths), {"soft_cap": 10**400}),
        (
            ValueError,
            "`scale` must be finite in float32, got 1e.39",
            (q, flat, lengths),
            {"scale": 1e39},
        ),
        (ValueError, "finite in float32, got 1000000", (q, flat, lengths), {"scale": 10**400}),
        (
            TypeError,
            "`soft_cap` must be a real number, got 'a'",
            (q, flat, lengths),
            {"soft_cap": "a"},
        ),
        (
            TypeError,
            "`sinks` must be an array, got list",
            (q, flat, lengths),
            {"sinks": [1.0] * Nq},
        ),
        (
            TypeError,
            "`sinks` must have dtype float32, got float64",
            (q, flat, lengths),
            {"sinks": np.ones(Nq)},
        ),
        (
            ValueError,
            r"`sinks` must have shape \[Nq\] = \[4\], got \[3\]",
            (q, flat, lengths),
            {"sinks": np.ones(Nq - 1, np.float32)},
        ),
        (
            TypeError,
            "`return_lse` must be a bool, got 1",
            (q, flat, lengths),
            {"return_lse": 1},
        ),
        (
            ValueError,
            "`scale` must be finite in float32, got nan",
            (q, flat, lengths),
            {"scale": float("nan")},
        ),
        (
            ValueError,
            "`scale` must be finite in float32, got -inf",
            (q, flat, lengths),
            {"scale": -np.inf},
        ),
    ]


@pytest.mark.parametrize(("error", "message", "arguments", "options"), refused())
def test_refuses(error, message, arguments, options):
    with pytest.raises(error, match=message):
        decode_attention(*arguments, **options)


PARTS = np.zeros((2, 3, 4, 8), np.float32), np.zeros((2, 3, 4), np.float32)  # out and lse

MERGES = [
    (ValueError, "as many, and at least one, got 0 and 0", ([], [])),
    (ValueError, "`outs` and `lses` must be as many, .* got 2 and 1", ([PARTS[0]] * 2, [PARTS[1]])),
    (TypeError, r"`outs\[0\]` must have dtype .*, got int32",
     ([PARTS[0].astype(np.int32)], [PARTS[1]])),
    (TypeError, r"`lses\[1\]` must have dtype float32, got float64",
     ([PARTS[0]] * 2, [PARTS[1], PARTS[1].astype(np.float64)])),
    (TypeError, r"`lses\[0\]` must be 3-D, got 4-D", ([PARTS[0]], [PARTS[0]])),
    (ValueError, r"`outs\[1\]` must have shape \[..., Nq, D\] = \[2, 3, 4, 8\], got \[1, 3, 4, 8\]",
     ([PARTS[0], PARTS[0][:1]], [PARTS[1]] * 2)),
    (ValueError, r"`lses\[0\]` must have shape \[..., Nq\] = \[2, 3, 4\], got \[2, 3, 3\]",
     ([PARTS[0]], [PARTS[1][..., :3]])),
    (ValueError, r"`sinks` must have shape \[Nq\] = \[4\], got \[3\]",
     ([PARTS[0]], [PARTS[1]], np.zeros(3, np.float32))),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "arguments"), MERGES)
def test_merge_refuses(error, message, arguments):
    with pytest.raises(error, match=message):
        merge_attention(*arguments)


@pytest.mark.parametrize("scale", [[5.0], "a", 1j])
def test_scale_is_a_number(scale):
    cache, _ = make("contiguous", np.random.default_rng(0))
    q, lengths = np.ones((B, S, Nq, D), np.float32), np.zeros(B, np.int32)
    with pytest.raises(TypeError, match="`scale` must be a real number, got"):
        decode_attention(q, cache, lengths, scale=scale)
