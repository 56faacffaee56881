"""The package's private modules and names that tests look into: imported here and nowhere else."""

# ruff: noqa: F401
from jax_kvcache import _ascend as ascend
from jax_kvcache import _cache as layered_update
from jax_kvcache import _compat as compat
from jax_kvcache import _ffi as library
from jax_kvcache import _pjrt as pjrt
from jax_kvcache import _primitive as primitive
from jax_kvcache import _reference as reference
from jax_kvcache import _standin as standin_build
from jax_kvcache._checks import Call
from jax_kvcache._op import canonical_operands
from jax_kvcache._reference import Operands
from jax_kvcache.numerics import demo_model as calibrate_model
