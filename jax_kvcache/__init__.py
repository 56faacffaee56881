"""Fused dequantise, RoPE, int8-quantise and KV-cache write for LLM inference in JAX."""

from jax_kvcache._explain import Explanation as Explanation
from jax_kvcache._explain import explain as explain
from jax_kvcache._op import DequantRopeQuantKvcacheResult as DequantRopeQuantKvcacheResult
from jax_kvcache._op import dequant_rope_quant_kvcache as dequant_rope_quant_kvcache

__version__ = "0.1.0"
