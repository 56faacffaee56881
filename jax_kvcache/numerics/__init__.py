"""Scales for the int8 cache, and what they cost: observers, calibration, measures, formats."""

from jax_kvcache.numerics.attention_error import AttentionError as AttentionError
from jax_kvcache.numerics.attention_error import attention_error as attention_error
from jax_kvcache.numerics.calibration import METHODS as METHODS
from jax_kvcache.numerics.calibration import Calibration as Calibration
from jax_kvcache.numerics.calibration import FakeQuantized as FakeQuantized
from jax_kvcache.numerics.calibration import calibrate as calibrate
from jax_kvcache.numerics.calibration import fake_quantize as fake_quantize
from jax_kvcache.numerics.calibration import scale_and_offset as scale_and_offset
from jax_kvcache.numerics.formats import FORMATS as FORMATS
from jax_kvcache.numerics.measures import ErrorObserver as ErrorObserver
from jax_kvcache.numerics.measures import ErrorReport as ErrorReport
from jax_kvcache.numerics.measures import PairedDifference as PairedDifference
from jax_kvcache.numerics.measures import divergence as divergence
from jax_kvcache.numerics.measures import paired_difference as paired_difference
from jax_kvcache.numerics.measures import sqnr as sqnr
from jax_kvcache.numerics.measures import token_agreement as token_agreement
from jax_kvcache.numerics.observers import MinMax as MinMax
from jax_kvcache.numerics.observers import Sketch as Sketch
from jax_kvcache.numerics.observers import merge as merge
from jax_kvcache.numerics.observers import observe as observe
