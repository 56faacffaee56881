"""Scales for the int8 cache, and what they cost: observers, calibration, measures, formats.

To calibrate a model of your own, read some prompts and look at the k and v that `update` returns.
While there are no scales yet, attend over these k and v, not over the cache:

    observers = {name: numerics.Sketch.create((Nkv, D)) for name in "kv"}
    ones = jnp.ones((Nkv, D))
    unused = KVCache.create(B, S, Nkv, D, scale_k=ones, scale_v=ones)
    for x in prompts:  # [B, S, H] of one layer; k and v of padding have to become NaN
        q, k, v, _ = unused.update(
            x, cos, sin, starts, weight_scale=weight_scale, kv_output=True
        )
        observers = numerics.observe(observers, {"k": k, "v": v})
    k, v = (numerics.calibrate(observers[name], method="mse") for name in "kv")
    cache = KVCache.create(B, length, Nkv, D, scale_k=k.scale, scale_v=v.scale)

Observers of all layers at once have the channels [L, Nkv, D], and take values [..., L, Nkv, D].
"""

from jax_kvcache.numerics.calibration import METHODS as METHODS
from jax_kvcache.numerics.calibration import Calibration as Calibration
from jax_kvcache.numerics.calibration import FakeQuantized as FakeQuantized
from jax_kvcache.numerics.calibration import calibrate as calibrate
from jax_kvcache.numerics.calibration import fake_quantize as fake_quantize
from jax_kvcache.numerics.calibration import scale_and_offset as scale_and_offset
from jax_kvcache.numerics.error_observer import ErrorObserver as ErrorObserver
from jax_kvcache.numerics.error_observer import ErrorReport as ErrorReport
from jax_kvcache.numerics.formats import FORMATS as FORMATS
from jax_kvcache.numerics.measures import AttentionError as AttentionError
from jax_kvcache.numerics.measures import PairedDifference as PairedDifference
from jax_kvcache.numerics.measures import attention_error as attention_error
from jax_kvcache.numerics.measures import divergence as divergence
from jax_kvcache.numerics.measures import paired_difference as paired_difference
from jax_kvcache.numerics.measures import sqnr as sqnr
from jax_kvcache.numerics.measures import token_agreement as token_agreement
from jax_kvcache.numerics.observers import MinMax as MinMax
from jax_kvcache.numerics.observers import Sketch as Sketch
from jax_kvcache.numerics.observers import merge as merge
from jax_kvcache.numerics.observers import observe as observe
