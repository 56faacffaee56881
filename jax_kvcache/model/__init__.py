"""A decoder that runs on the int8 cache: Llama, Mistral, Qwen2 and Qwen3, and the demo's model."""

from jax_kvcache.model.float_cache import FloatCache as FloatCache
from jax_kvcache.model.forward import forward as forward
from jax_kvcache.model.forward import forward_float as forward_float
from jax_kvcache.model.weights import Config as Config
from jax_kvcache.model.weights import Model as Model
from jax_kvcache.model.weights import new_cache as new_cache
from jax_kvcache.model.weights import new_paged_cache as new_paged_cache
