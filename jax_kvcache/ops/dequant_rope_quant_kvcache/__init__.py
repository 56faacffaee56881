"""The operator that writes the cache: dequantise, rotate, quantise, write."""
