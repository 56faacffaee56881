"""A small byte-level language model that decodes with an int8 cache: the demo and its measure."""

from jax_kvcache.model.forward import forward as forward
from jax_kvcache.model.forward import forward_float as forward_float
from jax_kvcache.model.weights import Config as Config
from jax_kvcache.model.weights import Model as Model
from jax_kvcache.model.weights import load_model as load_model
from jax_kvcache.model.weights import new_cache as new_cache
