"""KV caches as pytrees: int8 codes with their scales, written in place by the operator."""

from jax_kvcache.caches.allocator import BlockAllocator as BlockAllocator
from jax_kvcache.caches.batch import BlockCopy as BlockCopy
from jax_kvcache.caches.batch import OutOfBlocksError as OutOfBlocksError
from jax_kvcache.caches.batch import RaggedBatch as RaggedBatch
from jax_kvcache.caches.contiguous import KVCache as KVCache
from jax_kvcache.caches.paged import PagedKVCache as PagedKVCache
from jax_kvcache.caches.paged import slots_from_block_table as slots_from_block_table
