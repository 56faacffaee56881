"""The package's private modules and names that tests look into: imported here and nowhere else."""

# ruff: noqa: F401
from jax_kvcache import _compat as compat
from jax_kvcache import backends, mesh, modes
from jax_kvcache.backends import ascend, ascend_plugin, cuda, library, pjrt
from jax_kvcache.cli import bench_gpu
from jax_kvcache.model import calibrate as calibrate_model
from jax_kvcache.ops import indexing, operands, operator, slots
from jax_kvcache.ops.decode_attention import api as attention_api
from jax_kvcache.ops.decode_attention import cudnn
from jax_kvcache.ops.decode_attention import primitive as attention_primitive
from jax_kvcache.ops.decode_attention import reference as attention_reference
from jax_kvcache.ops.decode_attention.reference import Operands as AttentionOperands
from jax_kvcache.ops.decode_attention.reference import Results as AttentionResults
from jax_kvcache.ops.dequant_rope_quant_kvcache import api, primitive, reference
from jax_kvcache.ops.dequant_rope_quant_kvcache.api import canonical_operands
from jax_kvcache.ops.dequant_rope_quant_kvcache.checks import Call
from jax_kvcache.ops.dequant_rope_quant_kvcache.reference import Operands, Results, WriteOptions
from jax_kvcache.rope_parameters import read_rope_parameters
from jax_kvcache.testing import build as standin_build
