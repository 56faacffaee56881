"""The CPU backend: a native kernel of every operator, built with the library."""

from jax_kvcache.backends import library
from jax_kvcache.backends.backend import Backend, Target

CPU = Backend(
    name="cpu",
    lowered_as=("cpu",),
    registered_as=("cpu",),
    reported_as=("cpu",),
    targets={
        "dequant_rope_quant_kvcache": Target("dequant_rope_quant_kvcache_cpu"),
        "decode_attention": Target("decode_attention_cpu"),
    },
    unavailable=library.missing,
    is_here=lambda: True,
    lowers_elsewhere=False,
)
