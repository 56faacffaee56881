"""Fused dequantise, RoPE, int8-quantise and KV-cache write for LLM inference in JAX."""

from jax_kvcache.caches import BlockAllocator as BlockAllocator
from jax_kvcache.caches import BlockCopy as BlockCopy
from jax_kvcache.caches import KVCache as KVCache
from jax_kvcache.caches import OutOfBlocksError as OutOfBlocksError
from jax_kvcache.caches import PagedKVCache as PagedKVCache
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
