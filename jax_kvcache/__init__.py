"""An int8 KV cache for LLM inference in JAX: its fused write, attention, caches, checkpoints.

The operators, functions of arrays, and what says which implementation of each would run:

- `dequant_rope_quant_kvcache`, `explain`: the write
- `decode_attention`, `explain_attention`, `merge_attention`: the read, and partial results of it

The caches, pytrees of int8 codes and their scales:

- `KVCache`: each sequence has rows of its own
- `PagedKVCache`, `BlockAllocator`, `slots_from_block_table`: blocks of rows, and who has them

What goes into a call:

- `rope_tables`: cosines and sines; `permute_for_rope`: weights of models that pair neighbours
- `interleave_qkv_for_tensor_parallel`, `deinterleave_qkv_for_tensor_parallel`: the order of the
  projection's columns inside `jax.shard_map`; `local_slots`: a device's own rows there
- `jax_kvcache.numerics` (a module to import): scales, and what they cost
- `jax_kvcache.checkpoints` (a module to import): models and scales from folders, and to them

To export a program that calls an operator: `disabled_export_checks`. On the command line:
`python -m jax_kvcache`.
"""

from jax_kvcache.caches import BlockAllocator as BlockAllocator
from jax_kvcache.caches import BlockCopy as BlockCopy
from jax_kvcache.caches import KVCache as KVCache
from jax_kvcache.caches import OutOfBlocksError as OutOfBlocksError
from jax_kvcache.caches import PagedKVCache as PagedKVCache
from jax_kvcache.caches import RaggedBatch as RaggedBatch
from jax_kvcache.caches import slots_from_block_table as slots_from_block_table
from jax_kvcache.export import disabled_export_checks as disabled_export_checks
from jax_kvcache.ops.decode_attention.api import decode_attention as decode_attention
from jax_kvcache.ops.decode_attention.explain import explain_attention as explain_attention
from jax_kvcache.ops.decode_attention.merge import merge_attention as merge_attention
from jax_kvcache.ops.dequant_rope_quant_kvcache.api import (
    DequantRopeQuantKvcacheResult as DequantRopeQuantKvcacheResult,
)
from jax_kvcache.ops.dequant_rope_quant_kvcache.api import (
    dequant_rope_quant_kvcache as dequant_rope_quant_kvcache,
)
from jax_kvcache.ops.dequant_rope_quant_kvcache.explain import explain as explain
from jax_kvcache.ops.implementation import Explanation as Explanation
from jax_kvcache.rope import RopePermutation as RopePermutation
from jax_kvcache.rope import permute_for_rope as permute_for_rope
from jax_kvcache.rope import rope_tables as rope_tables
from jax_kvcache.tensor_parallel import (
    deinterleave_qkv_for_tensor_parallel as deinterleave_qkv_for_tensor_parallel,
)
from jax_kvcache.tensor_parallel import (
    interleave_qkv_for_tensor_parallel as interleave_qkv_for_tensor_parallel,
)
from jax_kvcache.tensor_parallel import local_slots as local_slots
from jax_kvcache.version import __version__ as __version__

__all__ = [
    "BlockAllocator",
    "BlockCopy",
    "DequantRopeQuantKvcacheResult",
    "Explanation",
    "KVCache",
    "OutOfBlocksError",
    "PagedKVCache",
    "RaggedBatch",
    "RopePermutation",
    "__version__",
    "decode_attention",
    "deinterleave_qkv_for_tensor_parallel",
    "dequant_rope_quant_kvcache",
    "disabled_export_checks",
    "explain",
    "explain_attention",
    "interleave_qkv_for_tensor_parallel",
    "local_slots",
    "merge_attention",
    "permute_for_rope",
    "rope_tables",
    "slots_from_block_table",
]
