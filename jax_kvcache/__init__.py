"""Fused dequantise, RoPE, int8-quantise and KV-cache write for LLM inference in JAX."""
