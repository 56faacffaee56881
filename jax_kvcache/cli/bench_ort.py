"""The benchmark's peer: onnxruntime's GroupQueryAttention with an int8 cache, where installed.

It is the same step: RoPE by halves, static int8 scales per channel, rows written in place,
attention over them. `pip install 'jax-kvcache[bench]'` installs it.
"""

import importlib.util
from typing import Any, Self

import numpy as np


class GroupQueryAttention:
    """One step of onnxruntime's operator, on caches of its own that it updates in place."""

    @classmethod
    def available(cls, B: int, rows: int, Nq: int, Nkv: int, D: int) -> Self | None:
        """The peer for a shape of one new token per sequence; None where it is not installed."""
        packages = ("onnx", "onnxruntime")
        if any(importlib.util.find_spec(name) is None for name in packages):
            return None
        return cls(B, rows, Nq, Nkv, D)

    def __init__(self, B: int, rows: int, Nq: int, Nkv: int, D: int):
        """Builds a model of the one operator."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            _model(Nq, Nkv), options, providers=["CPUExecutionProvider"]
        )
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        rng = np.random.default_rng(0)
        angles = np.arange(rows)[:, None] * 10_000.0 ** (-np.arange(D // 2) * 2 / D)
        scale = rng.uniform(0.01, 0.02, Nkv * D).astype(np.float32)
        codes = [rng.integers(-128, 128, (B, Nkv, rows, D), np.int8) for _ in "kv"]
        self._fixed = {
            "cos_cache": self._value(np.cos(angles).astype(np.float32)),
            "sin_cache": self._value(np.sin(angles).astype(np.float32)),
            "k_scale": self._value(scale),
            "v_scale": self._value(scale),
            "total_sequence_length": self._value(np.array([rows], np.int32)),
        }
        self._caches = {n: self._value(c) for n, c in zip(("key", "value"), codes, strict=True)}

    def step(self, state: None, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, None]:
        """One token per sequence; the new rows are the last of `lengths`."""
        binding = self._session.io_binding()
        binding.bind_ortvalue_input("query", self._value(inputs["x"]))
        last = (inputs["lengths"] - 1).astype(np.int32)
        binding.bind_ortvalue_input("seqlens_k", self._value(last))
        for name, value in self._fixed.items():
            binding.bind_ortvalue_input(name, value)
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(f"past_{name}", cache)
            binding.bind_ortvalue_output(f"present_{name}", cache)
        binding.bind_output("output")
        self._session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy(), state


def _model(Nq: int, Nkv: int) -> bytes:
    from onnx import TensorProto, helper

    inputs: list[tuple[str, Any]] = [
        ("query", TensorProto.FLOAT), ("", None), ("", None),
        ("past_key", TensorProto.INT8), ("past_value", TensorProto.INT8),
        ("seqlens_k", TensorProto.INT32), ("total_sequence_length", TensorProto.INT32),
        ("cos_cache", TensorProto.FLOAT), ("sin_cache", TensorProto.FLOAT),
        ("", None), ("", None), ("", None),
        ("k_scale", TensorProto.FLOAT), ("v_scale", TensorProto.FLOAT),
    ]  # fmt: skip
    outputs = [
        ("output", TensorProto.FLOAT),
        ("present_key", TensorProto.INT8),
        ("present_value", TensorProto.INT8),
    ]
    node = helper.make_node(
        "GroupQueryAttention",
        [name for name, _ in inputs],
        [name for name, _ in outputs],
        domain="com.microsoft",
        num_heads=Nq,
        kv_num_heads=Nkv,
        do_rotary=1,
        k_quant_type="PER_CHANNEL",
        v_quant_type="PER_CHANNEL",
        kv_cache_bit_width=8,
    )
    graph = helper.make_graph(
        [node],
        "step",
        [helper.make_tensor_value_info(n, t, None) for n, t in inputs if n],
        [helper.make_tensor_value_info(n, t, None) for n, t in outputs],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return model.SerializeToString()
