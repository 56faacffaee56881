"""`python -m jax_kvcache demo`: a language model writes Python from an int8 KV cache."""

import argparse
import codecs
import functools
import itertools
import time

import jax
import jax.numpy as jnp

from jax_kvcache.cli import CommandError, add_model_arguments, model_from
from jax_kvcache.model import Model, new_cache
from jax_kvcache.model.generate import generate, greedy_with_float_cache
from jax_kvcache.ops.dequant_rope_quant_kvcache.explain import explain
from jax_kvcache.ops.implementation import Explanation, Implementation

PROMPT = "import os\nimport sys\n\n\ndef "


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "demo",
        help="a small language model writes Python from an int8 KV cache",
        description="Writes Python, a byte at a time, with a model of 2.8 million parameters. "
        "Every layer of every step goes through the operator, in one jitted step that keeps the "
        "caches in place.",
    )
    parser.add_argument("--prompt", default=PROMPT, help="the text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="bytes to write (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: 0.7)")
    parser.add_argument("--seed", type=int, default=1, help="of the sampling (default: 1)")
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Streams the text, then prints the table."""
    model = model_from(arguments)
    prompt = arguments.prompt.encode(errors="surrogateescape")
    _check(arguments, prompt, model.config.context)

    cache = new_cache(model, 1)
    codes, nbytes = cache.k_cache.size + cache.v_cache.size, cache.nbytes
    steps = generate(
        model,
        cache,
        prompt,
        temperature=arguments.temperature,
        seed=arguments.seed,
        implementation=arguments.implementation,
    )
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(decoder.decode(prompt), end="", flush=True)
    text, greedy, times = bytearray(prompt), [], []
    for step in itertools.islice(steps, arguments.tokens):
        times.append(time.perf_counter())
        text.append(int(step.byte[0]))
        greedy.append(int(step.greedy[0]))
        print(decoder.decode(text[-1:]), end="", flush=True)
    print(decoder.decode(b"", final=True), end="\n\n")
    agree = greedy_with_float_cache(model, bytes(text))[len(prompt) - 1 : -1] == greedy
    _print_table(
        {
            "tokens/s": _rate(times),
            "cache bytes": f"{nbytes:,} with its scales; in bfloat16 {2 * codes:,}",
            "greedy as with a float cache": f"{agree.sum()} of {len(greedy)} tokens",
            "lowering": str(_explain(model, arguments.implementation)),
        }
    )


def _check(arguments: argparse.Namespace, prompt: bytes, context: int) -> None:
    if arguments.tokens < 1:
        raise CommandError(f"`--tokens` must be at least 1, got {arguments.tokens}.")
    if not 0 <= arguments.temperature <= float(jnp.finfo(jnp.float32).max):
        raise CommandError(
            f"`--temperature` must be 0 or more and finite in float32, got {arguments.temperature}."
        )
    if not 0 <= arguments.seed < 2**32:
        raise CommandError(f"`--seed` must be in [0, 2**32), got {arguments.seed}.")
    if not prompt:
        raise CommandError("`--prompt` must have at least 1 byte, got none.")
    if len(prompt) + arguments.tokens > context:
        raise CommandError(
            f"`--prompt` and `--tokens` together must have at most {context} bytes, the model's "
            f"context, got {len(prompt)} + {arguments.tokens}."
        )


def _rate(times: list[float]) -> str:
    """Tokens per second after the first two, which wait for the compiler."""
    if len(times) < 3:
        return "too few tokens to say"
    return f"{(len(times) - 2) / (times[-1] - times[1]):.0f}"


def _explain(model: Model, implementation: Implementation) -> Explanation:
    """What the operator says of one layer's call in a step."""
    config = model.config
    width = (config.n_q_heads + 2 * config.n_kv_heads) * config.head_dim
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    table = jax.ShapeDtypeStruct((1, 1, 1, config.head_dim), jnp.bfloat16)
    shape = (1, config.context, config.n_kv_heads, config.head_dim)
    k_cache, v_cache = (jax.ShapeDtypeStruct(shape, jnp.int8) for _ in "kv")
    heads = f32((config.n_kv_heads, config.head_dim))
    return explain(
        jax.ShapeDtypeStruct((1, 1, width), jnp.int32),
        table,
        table,
        k_cache,
        v_cache,
        jax.ShapeDtypeStruct((1,), jnp.int32),
        heads,
        heads,
        weight_scale=f32((width,)),
        activation_scale=f32((1, 1)),
        bias=f32((width,)),
        implementation=implementation,
    )


def _print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")
