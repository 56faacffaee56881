"""RoPE of real configurations against the library that defines the types, and what is refused."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.internals import read_rope_parameters

from jax_kvcache import rope_tables

# NAME.config (JSON), NAME.inv_freq [r/2] float32 and NAME.attention_factor, from transformers 5.23.
GOLDEN = dict(np.load(pathlib.Path(__file__).with_name("rope_hf.npz"), allow_pickle=False))
NAMES = sorted(key.removesuffix(".config") for key in GOLDEN if key.endswith(".config"))
ONE = np.zeros((1, 1), np.int32)


def configuration(name):
    config = json.loads(str(GOLDEN[f"{name}.config"]))
    parameters = config["rope_parameters"]
    if parameters["rope_type"] in ("dynamic", "longrope"):
        parameters["max_position_embeddings"] = config["max_position_embeddings"]
    return parameters, config["head_dim"], config["seq_len"]


def test_there_are_thirteen():
    assert len(NAMES) == 13


@pytest.mark.parametrize("name", NAMES)
def test_frequencies_are_the_librarys(name):
    """Up to 3 units of the last bit of float32, in which the library computes and this does not."""
    parameters, head_dim, seq_len = configuration(name)
    frequencies, factor = read_rope_parameters(parameters).frequencies(head_dim, seq_len)
    np.testing.assert_allclose(
        frequencies.astype(np.float32), GOLDEN[f"{name}.inv_freq"], rtol=3.6e-7, atol=0
    )
    assert factor == float(GOLDEN[f"{name}.attention_factor"])


@pytest.mark.parametrize("name", NAMES)
def test_tables_have_the_frequencies_and_the_factor(name):
    parameters, head_dim, seq_len = configuration(name)
    positions = np.array([[0, 1, 2, 77]], np.int32)
    turning = len(GOLDEN[f"{name}.inv_freq"])
    cos, sin = jax.jit(
        lambda p: rope_tables(
            p, head_dim, dtype=jnp.float32, rope_parameters=parameters, seq_len=seq_len
        )
    )(positions)
    angles = positions[..., None] * GOLDEN[f"{name}.inv_freq"].astype(np.float64)
    factor = float(GOLDEN[f"{name}.attention_factor"])
    for table, expected, rest in ((cos, np.cos(angles), 1), (sin, np.sin(angles), 0)):
        table = np.asarray(table)[:, :, 0]
        half = table[..., : head_dim // 2]
        np.testing.assert_array_equal(half, table[..., head_dim // 2 :])
        np.testing.assert_allclose(half[..., :turning], expected * factor, atol=3e-5)
        np.testing.assert_array_equal(half[..., turning:], rest)


def test_older_files():
    """`rope_scaling` says `type`, and the base stands beside it in the file."""
    older = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    newer = {"rope_type": "yarn", "rope_theta": 1e6} | {k: older[k] for k in list(older)[1:]}
    assert read_rope_parameters(older, 1e6) == read_rope_parameters(newer)
    assert read_rope_parameters(None) == read_rope_parameters({"rope_theta": 10000.0})
    assert read_rope_parameters({"factor": None}, 5e5).theta == 5e5


def test_dynamic_starts_from_the_length_it_was_trained_for():
    parameters = {"type": "dynamic", "factor": 2.0, "max_position_embeddings": 8192}
    trained = parameters | {"original_max_position_embeddings": 4096}
    only = {"type": "dynamic", "factor": 2.0, "max_position_embeddings": 4096}
    expected, _ = read_rope_parameters(only).frequencies(64, 6000)
    frequencies, _ = read_rope_parameters(trained).frequencies(64, 6000)
    np.testing.assert_array_equal(frequencies, expected)


def test_longrope_factor_from_the_two_lengths_or_as_given():
    parameters = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 4096,
    }
    by_ratio = read_rope_parameters(parameters | {"max_position_embeddings": 131072})
    by_factor = read_rope_parameters(parameters | {"factor": 32.0})
    assert by_ratio.frequencies(8, 1)[1] == by_factor.frequencies(8, 1)[1] > 1
    given = read_rope_parameters(parameters | {"attention_factor": 1.5})
    assert given.frequencies(8, 1)[1] == 1.5
    shorter = read_rope_parameters(parameters | {"factor": 0.5})
    assert shorter.frequencies(8, 1)[1] == 1.0
    long, short = (given.frequencies(8, n)[0] for n in (4097, 4096))
    np.testing.assert_array_equal(long * 2, short)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ([], TypeError, "`rope_parameters` must be a dict, got list"),
        ({"rope_type": "su"}, ValueError, 'the rope_type "su"; known are default, linear'),
        ({"type": "mrope"}, ValueError, 'the rope_type "mrope"; known are default'),
        (
            {"rope_type": "default", "mrope_section": [16, 24, 24]},
            ValueError,
            'the key "mrope_section", which rope_type "default" does not define; known are',
        ),
        ({"rope_type": "yarn", "type": "su"}, ValueError, 'got rope_type "yarn" and type "su"'),
        ({"rope_type": "linear"}, ValueError, 'must have "factor" for rope_type "linear"'),
        (
            {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"},
            ValueError,
            'must have "original_max_position_embeddings" for rope_type "llama3"',
        ),
        (LLAMA3 | {"high_freq_factor": 1.0}, ValueError, 'above "low_freq_factor" = 1.0, got 1.0'),
        (YARN | {"factor": "4"}, TypeError, r"\[\"factor\"\]` must be a number, got '4'"),
        (YARN | {"factor": -4}, ValueError, r'\["factor"\]` must be finite and above 0, got -4'),
        (
            YARN | {"factor": 10**400},
            ValueError,
            r'\["factor"\]` must be finite and above 0, got 10',
        ),
        ({"rope_type": ["yarn"]}, ValueError, r"the rope_type \"\['yarn'\]\"; known are default"),
        (
            YARN | {"rope_theta": 1.0},
            ValueError,
            'of rope_type "yarn" must give finite frequencies, and do not for "rope_theta" = 1',
        ),
        ({"rope_type": "linear", "factor": 1e-320}, ValueError, 'of rope_type "linear" must give'),
        (YARN | {"truncate": 1}, TypeError, r'\["truncate"\]` must be a bool, got 1'),
        (
            {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 1.5},
            ValueError,
            r"`partial_rotary_factor` must be in \(0, 1\], got 1.5",
        ),
        (
            {"partial_rotary_factor": 0.1},
            ValueError,
            "even number of dimensions above 0, got 0.1 of `head_dim` = 8",
        ),
        (
            {"rope_type": "dynamic", "factor": 2.0},
            ValueError,
            'must have "max_position_embeddings" for rope_type "dynamic"',
        ),
        (
            {"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": 64},
            ValueError,
            '`seq_len` must be an int above 0 for rope_type "dynamic".*, got None',
        ),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0],
                "long_factor": [1.0],
                "original_max_position_embeddings": 64,
            },
            ValueError,
            'must have "factor", "attention_factor" or "max_position_embeddings"',
        ),
    ],
)
def test_refuses(parameters, error, message):
    with pytest.raises(error, match=message):
        rope_tables(ONE, 8, rope_parameters=parameters)


def test_refuses_a_factor_that_is_no_list():
    parameters = {
        "rope_type": "longrope",
        "factor": 2.0,
        "short_factor": 5,
        "long_factor": [1.0] * 4,
        "original_max_position_embeddings": 64,
    }
    with pytest.raises(TypeError, match=r'\["short_factor"\]` must be a list, got 5'):
        rope_tables(ONE, 8, rope_parameters=parameters, seq_len=64)


def test_refuses_a_base_beyond_float():
    with pytest.raises(ValueError, match="`theta` must be a finite number above 0, got 1000"):
        rope_tables(ONE, 8, 10**400)


def test_refuses_two_bases():
    for parameters in ({"rope_theta": 5e5}, read_rope_parameters({"rope_theta": 5e5})):
        with pytest.raises(ValueError, match=r"`theta` .* beside a `rope_theta`.*1e4|10000"):
            rope_tables(ONE, 8, 1e4, rope_parameters=parameters)


def test_refuses_a_length_that_is_not_static():
    parameters = {"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": 64}
    with pytest.raises(TypeError, match="`seq_len` must be an int, got"):
        jax.jit(lambda n: rope_tables(ONE, 8, rope_parameters=parameters, seq_len=n))(3)


def test_refuses_a_list_of_another_length():
    parameters = {
        "rope_type": "longrope",
        "factor": 2.0,
        "short_factor": [1.0] * 3,
        "long_factor": [1.0] * 4,
        "original_max_position_embeddings": 64,
    }
    with pytest.raises(ValueError, match=r'\["short_factor"\]` must have r/2 = 4 numbers, got 3'):
        rope_tables(ONE, 8, rope_parameters=parameters, seq_len=64)
    rope_tables(ONE, 8, rope_parameters=parameters, seq_len=65)
