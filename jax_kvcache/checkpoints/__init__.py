"""Models from checkpoint folders, as the tools that quantise them write them."""

from jax_kvcache.checkpoints.demo import demo_folder as demo_folder
from jax_kvcache.checkpoints.demo import load_demo as load_demo
from jax_kvcache.checkpoints.errors import CheckpointError as CheckpointError
from jax_kvcache.checkpoints.kv_scales import read_kv_scales as read_kv_scales
from jax_kvcache.checkpoints.kv_scales import write_kv_scales as write_kv_scales
from jax_kvcache.checkpoints.load import load as load
from jax_kvcache.checkpoints.save import save as save
from jax_kvcache.checkpoints.tokenizer import load_tokenizer as load_tokenizer
