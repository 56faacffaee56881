"""`python -m jax_kvcache demo`: a language model writes text from an int8 KV cache."""

import argparse
import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvcache.checkpoints.tokenizer import Tokenizer
from jax_kvcache.cli import CommandError, add_run_arguments, model_from, tokens_of
from jax_kvcache.model import Model, new_cache
from jax_kvcache.model.forward import default_table_dtype, passes_floats
from jax_kvcache.model.generate import generate, greedy_with_float_cache
from jax_kvcache.ops.dequant_rope_quant_kvcache.explain import explain
from jax_kvcache.ops.implementation import Explanation, Implementation

PROMPT = "import os\nimport sys\n\n\ndef "
LEAST_ROWS = 256  # of the cache


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "demo",
        help="a small language model writes Python from an int8 KV cache",
        description="Continues a text, a token at a time: by default Python, with a model of 2.8 "
        "million parameters whose tokens are bytes. Every layer of every step goes through the "
        "operator, in one jitted step that keeps the caches in place. A folder without a "
        "tokenizer reads and writes the numbers of its tokens.",
    )
    parser.add_argument("--prompt", default=PROMPT, help="the text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to write (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: 0.7)")
    parser.add_argument("--seed", type=int, default=1, help="of the sampling (default: 1)")
    add_run_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Streams the text, then prints the table."""
    model, tokenizer = model_from(arguments)
    prompt = tokens_of(tokenizer, arguments.prompt.encode(errors="surrogateescape"))
    _check(arguments, len(prompt), model.config.context, tokenizer.unit)

    longest = len(prompt) + arguments.tokens
    rows = min(model.config.context, max(longest, LEAST_ROWS))
    cache = new_cache(model, 1, rows)
    table = {"cache bytes": _cache_bytes(model, rows, cache.nbytes)}
    steps = generate(
        model,
        cache,
        prompt,
        temperature=arguments.temperature,
        seed=arguments.seed,
        implementation=arguments.implementation,
    )
    stream = _Stream(tokenizer, prompt.tolist())
    greedy, times = [], []
    for step in itertools.islice(steps, arguments.tokens):
        times.append(time.perf_counter())
        greedy.append(int(step.greedy[0]))
        stream.write(int(step.token[0]))
        if stream.tokens[-1] in model.config.end_tokens:
            break
    stream.end()
    text = np.array(stream.tokens, np.int32)
    agree = greedy_with_float_cache(model, text, rows)[len(prompt) - 1 : -1] == greedy
    table = {"tokens/s": _rate(times)} | table
    if model.cache_params is not None:
        table["greedy as with a float cache"] = f"{agree.sum()} of {len(greedy)} tokens"
    _print_table(table | {"lowering": str(_explain(model, rows, arguments.implementation))})


class _Stream:
    """Prints a text as its tokens come; half of a character waits for the rest."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]):
        self.tokenizer, self.tokens = tokenizer, list(prompt)
        self.printed = ""
        self._print(final=False)

    def write(self, token: int) -> None:
        """Adds a token."""
        self.tokens.append(token)
        self._print(final=False)

    def end(self) -> None:
        """Prints what is left, and an empty line."""
        self._print(final=True)
        print("\n")

    def _print(self, *, final: bool) -> None:
        text = self.tokenizer.decode(self.tokens)
        if not final:
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        if len(text) > len(self.printed):
            print(text[len(self.printed) :], end="", flush=True)
            self.printed = text


def _cache_bytes(model: Model, rows: int, nbytes: int) -> str:
    config = model.config
    in_bfloat16 = 2 * 2 * config.n_layers * rows * config.n_kv_heads * config.head_dim
    if model.cache_params is None:
        return f"{nbytes:,} in float32, since the folder has no scales; calibrate makes them"
    return f"{nbytes:,} with its scales; in bfloat16 {in_bfloat16:,}"


def _check(arguments: argparse.Namespace, prompt: int, context: int, unit: str) -> None:
    if arguments.tokens < 1:
        raise CommandError(f"`--tokens` must be at least 1, got {arguments.tokens}.")
    if not 0 <= arguments.temperature <= float(jnp.finfo(jnp.float32).max):
        raise CommandError(
            f"`--temperature` must be 0 or more and finite in float32, got {arguments.temperature}."
        )
    if not 0 <= arguments.seed < 2**32:
        raise CommandError(f"`--seed` must be in [0, 2**32), got {arguments.seed}.")
    if not prompt:
        raise CommandError(f"`--prompt` must have at least 1 {unit}, got none.")
    if prompt + arguments.tokens > context:
        raise CommandError(
            f"`--prompt` and `--tokens` together must have at most {context} {unit}s, the model's "
            f"context, got {prompt} + {arguments.tokens}."
        )


def _rate(times: list[float]) -> str:
    """Tokens per second after the first two, which wait for the compiler."""
    if len(times) < 3:
        return "too few tokens to say"
    return f"{(len(times) - 2) / (times[-1] - times[1]):.0f}"


def _explain(model: Model, rows: int, implementation: Implementation) -> Explanation:
    """What the operator says of one layer's call in a step."""
    config = model.config
    width = (config.n_q_heads + 2 * config.n_kv_heads) * config.head_dim
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    table = jax.ShapeDtypeStruct((1, 1, 1, config.head_dim), default_table_dtype())
    shape = (1, rows, config.n_kv_heads, config.head_dim)
    k_cache, v_cache = (jax.ShapeDtypeStruct(shape, jnp.int8) for _ in "kv")
    heads = f32((config.n_kv_heads, config.head_dim))
    x_is_float = passes_floats(model.layers[0])
    return explain(
        jax.ShapeDtypeStruct((1, 1, width), table.dtype if x_is_float else jnp.int32),
        table,
        table,
        k_cache,
        v_cache,
        jax.ShapeDtypeStruct((1,), jnp.int32),
        heads,
        heads,
        weight_scale=None if x_is_float else f32((width,)),
        implementation=implementation,
    )


def _print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")
