"""Two processes with two devices each decode with the demo model; one dies, and the other ends."""

import contextlib
import importlib.util
import socket
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import process

from jax_kvcache.checkpoints import load_demo
from jax_kvcache.model import forward, new_cache

PROGRAM = process.PROGRAMS / "decode_over_processes.py"
LIMIT = 60  # seconds that a survivor may take: heartbeats are missed after 10


def program():
    spec = importlib.util.spec_from_file_location(PROGRAM.stem, PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def processes(layout, folder, dying=None):
    """Both processes, started; none outlives the test."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    started = []
    try:
        for i in range(2):
            result, dies_at = folder / f"{i}.npz", (["10"] if i == dying else [])
            command = process.command(PROGRAM, f"localhost:{port}", 2, i, layout, result, *dies_at)
            with (folder / f"{i}.log").open("w") as log:
                started.append(
                    subprocess.Popen(
                        command, env=process.environment(), stdout=log, stderr=subprocess.STDOUT
                    )
                )
        yield started
    finally:
        for one in started:
            one.kill()
            one.wait()


@pytest.fixture(scope="module")
def expected():
    """The same texts written by one device."""
    decode = program()
    texts = np.stack([np.frombuffer(t, np.uint8) for t in decode.TEXTS]).astype(np.int32)
    model = load_demo()
    cache = new_cache(model, len(texts))
    step = jax.jit(forward, donate_argnums=2)
    for i in range(decode.STEPS):
        positions = jnp.full(len(texts), i, jnp.int32)
        logits, cache = step(model, jnp.asarray(texts[:, i : i + 1]), cache, positions)
        if texts.shape[1] == i + 1:
            byte = np.asarray(jnp.argmax(logits[:, -1], axis=-1), np.int32)
            texts = np.concatenate([texts, byte[:, None]], axis=1)
    return texts


@pytest.mark.parametrize("layout", ["heads", "batch"])
def test_decoding(layout, tmp_path, expected):
    with processes(layout, tmp_path) as started:
        for i, one in enumerate(started):
            assert one.wait(timeout=200) == 0, (tmp_path / f"{i}.log").read_text()
    for i in range(2):
        with np.load(tmp_path / f"{i}.npz") as result:
            np.testing.assert_array_equal(result["texts"], expected)
            moved = {(kind, shape[:3]) for shape, kind in result["moved"]}
    assert not any("s8" in shape for _, shape in moved), "codes or a cache moved"
    assert (("all-reduce", "f32") in moved) == (layout == "heads")


@pytest.mark.parametrize(("layout", "dying"), [("heads", 1), ("batch", 0)])
def test_death_is_noticed(layout, dying, tmp_path):
    """The survivor ends with an error, whether it waits in a collective or for the coordinator."""
    with processes(layout, tmp_path, dying) as started:
        assert started[dying].wait(timeout=200) == -9, (tmp_path / f"{dying}.log").read_text()
        noticed = time.monotonic()
        assert started[1 - dying].wait(timeout=LIMIT) not in (0, -9)
        assert time.monotonic() - noticed < LIMIT
    log = (tmp_path / f"{1 - dying}.log").read_text()
    assert "Error" in log or "error" in log
    assert not (tmp_path / f"{1 - dying}.npz").exists()
