"""Modes of JAX under which nothing may change, each as what makes its context manager."""

import jax

MODES = {
    "x64": lambda: jax.enable_x64(True),
    "strict_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank_promotion_raises": lambda: jax.numpy_rank_promotion("raise"),
    "no_jit": jax.disable_jit,
}
