"""The CUDA backend without a GPU: what is said of it, what it refuses, what is lowered for it."""

import functools
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from support import calls, hlo
from support.internals import AttentionOperands, backends, compat, cuda, library

from jax_kvcache import (
    KVCache,
    PagedKVCache,
    decode_attention,
    dequant_rope_quant_kvcache,
    explain,
    explain_attention,
)

CUDA, BOTH = ("cuda",), ("cpu", "cuda")
ATTENTION_CALL = "@decode_attention("


def write(**options):
    function = functools.partial(dequant_rope_quant_kvcache, **options)
    return jax.jit(function, donate_argnames=("k_cache", "v_cache"))


def lowered(function, *arguments, platforms=CUDA, **call):
    return function.trace(*arguments, **call).lower(lowering_platforms=platforms).as_text()


def attention_types(D=128, S=1, kind="contiguous", B=4, rows=4096, block=64):
    cls = KVCache if kind == "contiguous" else PagedKVCache
    sizes = (B, rows) if kind == "contiguous" else (B * rows // block, block)
    codes = jax.ShapeDtypeStruct((*sizes, 2, D), jnp.int8)
    scale = jax.ShapeDtypeStruct((2, D), jnp.float32)
    cache = cls(codes, codes, scale, scale, None, None, None)
    call = {"positions": jax.ShapeDtypeStruct((B, S), jnp.int32)}
    if kind == "paged":
        call["block_table"] = jax.ShapeDtypeStruct((B, rows // block), jnp.int32)
    return jax.ShapeDtypeStruct((B, S, 8, D), jnp.bfloat16), cache, call


@pytest.mark.parametrize("platform", ["cuda", "gpu"])
def test_ffi_is_a_demand(platform):
    q, cache, call = attention_types()
    answers = [explain(**calls.arguments(), platform=platform, implementation="ffi")]
    answers += [explain_attention(q, cache, **call, platform=platform, implementation="ffi")]
    for answer in answers:
        assert answer.implementation == "ffi"
        assert "takes this call when it is lowered for another machine" in answer.reason


@pytest.mark.parametrize("platform", ["cuda", "gpu"])
def test_the_kernels_are_the_default(platform):
    q, cache, call = attention_types()
    assert explain(**calls.arguments(), platform=platform).implementation == "ffi"
    assert explain_attention(q, cache, **call, platform=platform).implementation == "ffi"
    assert hlo.NATIVE_CALL in lowered(write(), **calls.arguments())
    assert ATTENTION_CALL in lowered(jax.jit(decode_attention), q, cache, **call)


def test_another_makers_gpu_is_not_this_backend(monkeypatch):
    monkeypatch.setattr(compat, "initialized_backends", lambda: {"cpu": "cpu", "rocm": "rocm"})
    assert backends.find("gpu") is None
    assert backends.find("cuda") is cuda.CUDA  # what is lowered for another machine
    answer = explain(**calls.arguments(), platform="gpu")
    assert answer.implementation == "xla"
    assert "there is no native target for platform 'gpu'" in answer.reason
    monkeypatch.setattr(compat, "initialized_backends", lambda: {"cuda": "cuda", "rocm": "rocm"})
    assert backends.find("gpu") is cuda.CUDA


def test_a_prefill_is_xlas_silently():
    q, cache, call = attention_types(S=cuda.MAX_QUERIES + 1)
    answer = explain_attention(q, cache, **call, platform="cuda")
    assert answer.implementation == "xla"
    assert "S = 17 queries per sequence are a prefill" in answer.reason
    assert "not by cuDNN: this process has no NVIDIA GPU" in answer.reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = lowered(jax.jit(decode_attention), q, cache, **call)
    assert ATTENTION_CALL not in text


class Device(NamedTuple):
    compute_capability: str
    device_kind: str = "Tesla T4"


def test_an_old_card(monkeypatch):
    monkeypatch.setattr(cuda, "is_here", lambda: True)
    monkeypatch.setattr(cuda, "_not_built", lambda: None)
    monkeypatch.setattr(cuda, "_versions", lambda: (13000, 13000))
    monkeypatch.setattr(jax, "local_devices", lambda backend: [Device("9.0"), Device("7.5")])
    assert cuda.unavailable() == (
        "the kernels need compute capability 8.0 or newer, and Tesla T4 has 7.5"
    )
    monkeypatch.setattr(jax, "local_devices", lambda backend: [Device("12.0")])
    assert cuda.unavailable() is None


@pytest.mark.parametrize("platforms", [CUDA, BOTH], ids=str)
def test_the_write_is_lowered_in_place(platforms):
    function = write(kv_output=True, implementation="ffi")
    text = lowered(function, **calls.arguments(), platforms=platforms)
    lines = [line for line in text.splitlines() if hlo.NATIVE_CALL in line]
    assert len(lines) == len(platforms)
    for line in lines:
        assert "mhlo.backend_config = {kv_output = true}" in line
        for result in (3, 4):
            assert f"output_tuple_indices = [{result}], operand_index = {result}," in line
    assert "tf.aliasing_output = 3" in text
    assert "tf.aliasing_output = 4" in text


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_attention_is_lowered_with_scratch(kind):
    q, cache, call = attention_types(kind=kind)
    function = jax.jit(functools.partial(decode_attention, implementation="ffi", return_lse=True))
    text = lowered(function, q, cache, **call)
    [line] = [line for line in text.splitlines() if ATTENTION_CALL in line]
    # 8 blocks of threads without splits, and 4096 rows: 32 splits of 128 rows
    results = line.rsplit("->", 1)[1]
    scratch = 32 * 4 * 8 * (128 + 4)
    assert f"(tensor<4x1x8x128xbf16>, tensor<4x1x8xf32>, tensor<{scratch}xf32>)" in results
    for name in ("scale", "window", "soft_cap", "return_lse"):
        assert f"{name} = " in line
    copies = ("reshape", "transpose", "broadcast_in_dim", "concatenate")
    codes = "x2x128xi8>"
    for line in text.splitlines():
        assert not (codes in line and any(f"stablehlo.{op}" in line for op in copies)), line


@pytest.mark.parametrize("platforms", [CUDA, BOTH], ids=str)
def test_export(platforms):
    target = jax.export.DisabledSafetyCheck.custom_call("dequant_rope_quant_kvcache")
    exported = jax.export.export(
        write(implementation="ffi"), platforms=platforms, disabled_checks=[target]
    )
    again = jax.export.deserialize(exported(**calls.arguments()).serialize())
    assert again.platforms == platforms
    assert again.mlir_module().count("tf.aliasing_output") == 2


def test_export_of_attention_with_symbolic_sizes():
    target = jax.export.DisabledSafetyCheck.custom_call("decode_attention")
    b, rows = jax.export.symbolic_shape("b, rows")
    q, cache, call = attention_types(B=b, rows=rows)
    function = jax.jit(functools.partial(decode_attention, implementation="ffi"))
    exported = jax.export.export(function, platforms=CUDA, disabled_checks=[target])
    assert "decode_attention" in exported(q, cache, **call).mlir_module()


def operands(D=128, S=1, B=1, rows=4096, Nq=8, Nkv=2):
    types = {
        "q": (B, S, Nq, D), "k_cache": (B, rows, Nkv, D), "table": (B, 1), "positions": (B, S),
    }  # fmt: skip
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.int8) for name, shape in types.items()}
    return AttentionOperands(**dict.fromkeys(AttentionOperands._fields) | arrays)


REFUSED = {
    "the CUDA kernel takes D = 64, 80, 96, 112, 128, 192, 256, got D = 72": {"D": 72},
    "the CUDA kernel takes S <= 16 queries per sequence, got S = 17": {"S": 17},
    "the CUDA kernel numbers rows in 32 bits, got 4294967296 rows": {"rows": 2**32},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason):
    assert cuda.attention_refusal(operands(**REFUSED[reason])) == reason
    assert cuda.attention_refusal(operands()) is None


def test_a_refused_call_raises_or_is_explained():
    q, cache, call = attention_types(D=72)
    answer = explain_attention(q, cache, **call, platform="cuda", implementation="ffi")
    assert answer.implementation is None
    function = jax.jit(functools.partial(decode_attention, implementation="ffi"))
    with pytest.raises(NotImplementedError, match="the CUDA kernel takes D = 64, 80"):
        lowered(function, q, cache, **call)


# Where the C++ side says which head sizes there are, and how it says it.
FFI_CUDA = Path(__file__).parents[2] / "ffi" / "cuda"
SIZES_IN_CPP = {
    "decode_attention_call.cc": r"known : \{([\d, ]+)\}",  # taken
    "decode_attention.cc": r"LaunchBlocks<(\d+)>",  # launched
    "build.cmake": r"set\(CUDA_HEAD_DIMS ([\d ]+)\)",  # compiled
}


@pytest.mark.parametrize("source", SIZES_IN_CPP)
def test_the_head_sizes_are_those_in_cpp(source):
    found = re.findall(SIZES_IN_CPP[source], (FFI_CUDA / source).read_text())
    sizes = tuple(int(size) for text in found for size in re.findall(r"\d+", text))
    assert sizes == cuda.HEAD_DIMS


def test_splits():
    def splits(**sizes):
        return cuda.attention_splits(operands(**sizes))

    assert splits(B=1, rows=32768) == 128  # 2 blocks of threads fill no card
    assert splits(B=64, rows=2048) == 16  # of 128 rows
    assert splits(B=256, rows=2048) == 8
    assert splits(B=4096, rows=65536) == 1
    assert splits(B=1, rows=100) == 1
    assert cuda.attention_scratch(operands(B=4096, rows=2048))[0].shape == (0,)


def test_a_library_without_cuda_says_so(monkeypatch):
    monkeypatch.setattr(cuda, "_has", lambda symbol: False)
    assert "built without CUDA" in cuda.unavailable()
    assert "built without CUDA" in cuda.report()["kernels"]
    registered = []
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *a, **k: registered.append(a))
    cuda.register(cuda.CUDA)
    assert registered == []


def test_without_a_gpu_it_is_not_available():
    assert backends.unavailable("gpu", "decode_attention") in (
        "this process has no NVIDIA GPU",
        "the native library was built without CUDA, because no nvcc was found",
    )
    assert library.missing() is None


@pytest.mark.skipif(cuda.report()["kernels"] != "built", reason="built without CUDA")
def test_versions_are_those_of_cuda():
    driver, built = cuda._versions()
    assert 12000 <= built < 20000
    assert driver == 0 or 11000 <= driver < 20000  # 0: this machine has no driver


@pytest.mark.parametrize(("driver", "reason"), [(12080, True), (13000, False), (13020, False)])
def test_a_driver_older_than_the_kernels(driver, reason, monkeypatch):
    monkeypatch.setattr(cuda, "_versions", lambda: (driver, 13010))
    monkeypatch.setattr(cuda, "_not_built", lambda: None)
    monkeypatch.setattr(cuda, "is_here", lambda: True)
    monkeypatch.setattr(jax, "local_devices", lambda backend: [])
    expected = (
        "the kernels were built with CUDA 13.1, and the GPU's driver knows CUDA 12.8: "
        "install a newer driver, or build with CUDA 12"
    )
    assert cuda.unavailable() == (expected if reason else None)
