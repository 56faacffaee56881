"""Makes calls of both operators with hostile indices, tables, positions and numbers on a GPU."""

import itertools

import jax
import ml_dtypes
import numpy as np
from support import conformance
from support.attention import Call

import jax_kvcache

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
assert jax.devices()[0].platform == "gpu", jax.devices()

for cache_mode, S in itertools.product(("contiguous", "page"), (1, 3)):
    edges = conformance.contiguous_edges if cache_mode == "contiguous" else conformance.page_edges
    for indices in itertools.islice(edges(conformance.B, S), 0, None, 5):
        call = conformance.call_with(indices, C1=conformance.B, S=S, cache_mode=cache_mode)
        jax.block_until_ready(
            jax_kvcache.dequant_rope_quant_kvcache(
                **call, cache_mode=cache_mode, implementation="ffi"
            )
        )

for D, kind, dtype in itertools.product(
    (64, 80, 128, 256), ("contiguous", "paged"), (np.float32, ml_dtypes.bfloat16)
):
    call = Call(
        kind=kind, D=D, B=2, S=2, Nq=6, Nkv=2, rows=200, block=24, dtype=dtype, holes=True,
        offset=9.0, sinks=True,
    )  # fmt: skip
    q, cache, keywords = call.draw()
    keywords["positions"] = np.array([[INT32_MAX, INT32_MIN], [199, 200]], np.int32)
    for spoiled in (q, q.at[0, 0, 0, 0].set(np.nan), q.at[1, 1, 5, 3].set(np.inf)):
        jax.block_until_ready(
            jax_kvcache.decode_attention(spoiled, cache, implementation="ffi", **keywords)
        )
print("all calls ended")
