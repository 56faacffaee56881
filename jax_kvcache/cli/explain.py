"""`python -m jax_kvcache explain`: which implementation a model of some shape gets, and why."""

import argparse

import jax
import jax.numpy as jnp

from jax_kvcache.caches import KVCache
from jax_kvcache.cli import CommandError
from jax_kvcache.ops.decode_attention.explain import explain_attention
from jax_kvcache.ops.dequant_rope_quant_kvcache.explain import explain
from jax_kvcache.ops.implementation import Explanation
from jax_kvcache.ops.slots import INT32_MAX

DTYPES = ("float16", "bfloat16", "float32")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "explain",
        help="which implementation of each operator a model of some shape gets, and why",
        description="Says for one layer's step of a model of this shape which implementation "
        "would write the cache (dequant_rope_quant_kvcache) and which would read it "
        "(decode_attention). Nothing is computed. With tensor parallelism, give the heads of one "
        "device.",
    )
    parser.add_argument("--heads", type=int, required=True, metavar="N", help="query heads")
    parser.add_argument("--kv-heads", type=int, required=True, metavar="N", help="key/value heads")
    parser.add_argument("--head-dim", type=int, required=True, metavar="N", help="size of a head")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of cos, sin and q (default: bfloat16)"
    )
    parser.add_argument(
        "--float-x", action="store_true", help="x is of --dtype (default: int32 accumulators)"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (default: 1)")
    parser.add_argument(
        "--steps", type=int, default=1, metavar="N", help="tokens of each sequence (default: 1)"
    )
    parser.add_argument(
        "--length", type=int, default=4096, metavar="N", help="rows per sequence (default: 4096)"
    )
    parser.add_argument(
        "--platform", nargs="+", metavar="NAME", help="cpu, gpu, ... (default: this machine's)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Prints one line per operator and platform."""
    for name in ("heads", "kv_heads", "head_dim", "batch", "steps", "length"):
        size, option = getattr(arguments, name), f"--{name.replace('_', '-')}"
        if size < 1:
            raise CommandError(f"`{option}` must be at least 1, got {size}.")
        if size > INT32_MAX:
            raise CommandError(f"`{option}` must be at most {INT32_MAX}, got {size}.")
    if arguments.head_dim % 2:
        raise CommandError(f"`--head-dim` must be even, got {arguments.head_dim}.")
    if arguments.heads % arguments.kv_heads:
        raise CommandError(
            f"`--heads` must be a multiple of `--kv-heads` = {arguments.kv_heads}, "
            f"got {arguments.heads}."
        )
    if arguments.batch * arguments.length > INT32_MAX:
        raise CommandError(
            f"`--batch` times `--length` must be at most {INT32_MAX}, got "
            f"{arguments.batch * arguments.length}."
        )
    for platform in arguments.platform or [jax.default_backend()]:
        for name, answer in _answers(arguments, platform).items():
            print(f"{name:26}  {answer}")


def _answers(arguments: argparse.Namespace, platform: str) -> dict[str, Explanation]:
    def array(*shape: int, dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    B, S, Nkv, D = arguments.batch, arguments.steps, arguments.kv_heads, arguments.head_dim
    width = (arguments.heads + 2 * Nkv) * D
    cache = jax.eval_shape(
        lambda scale: KVCache.create(B, arguments.length, Nkv, D, scale_k=scale, scale_v=scale),
        array(Nkv, D, dtype="float32"),
    )
    table = array(B, S, 1, D, dtype=arguments.dtype)
    x_dtype = arguments.dtype if arguments.float_x else "int32"
    one_per_sequence = array(B, dtype="int32")
    return {
        "dequant_rope_quant_kvcache": explain(
            array(B, S, width, dtype=x_dtype), table, table, cache.k_cache, cache.v_cache,
            one_per_sequence, cache.scale_k, cache.scale_v,
            weight_scale=None if arguments.float_x else array(width, dtype="float32"),
            platform=platform,
        ),
        "decode_attention": explain_attention(
            array(B, S, arguments.heads, D, dtype=arguments.dtype), cache, one_per_sequence,
            platform=platform,
        ),
    }  # fmt: skip
