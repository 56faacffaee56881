"""Models from checkpoint folders: config, weights, quantisation and tokenizer, as they are written."""

from jax_kvcache.checkpoints.errors import CheckpointError as CheckpointError
from jax_kvcache.checkpoints.load import load as load
