"""From tensors to linear layers: what every format shares."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jax_kvcache.checkpoints.errors import CheckpointError
from jax_kvcache.checkpoints.tensors import TensorFiles
from jax_kvcache.model.linear import (
    DynamicInt8Linear,
    FloatLinear,
    Linear,
    StaticInt8Linear,
    quantize_weight,
)
from jax_kvcache.ops.checks import are_scales
from jax_kvcache.rope import permute_for_rope

KvParameters = dict[str, np.ndarray]  # scale_k, scale_v, offset_k, offset_v: [*L, Nkv, D]


def float32(files: TensorFiles, name: str, *shapes: tuple[int, ...]) -> np.ndarray:
    """A float tensor as float32."""
    return files.take(name, shapes).astype(np.float32)


def finite(name: str, values: np.ndarray, *, positive: bool = False) -> np.ndarray:
    """The values; raises CheckpointError unless all are finite, and can be scales if asked."""
    usable = are_scales(values) if positive else np.isfinite(values)
    if not usable.all():
        expected = "finite, normal and above 0" if positive else "finite"
        raise CheckpointError(f"`{name}` must be {expected}, got {values[~usable][0]}.")
    return values


def on_host(array: Any) -> jax.Array:
    """A NumPy array in a field that will hold a JAX array: `place` moves it to the device.

    Joining q, k and v on the host needs no program to be compiled while loading.
    """
    return array


def place(layer: Any) -> Any:
    """A pytree with its arrays on JAX's default device.

    It waits for the copies, so that no more than one layer's arrays wait for theirs; on a CPU,
    `device_put` takes over a buffer that is aligned for it, without a copy.
    """
    return jax.block_until_ready(jax.device_put(layer))


def float_weight(files: TensorFiles, name: str, out: int, width: int) -> jax.Array:
    """A float weight as it is; float16, in which products overflow, as float32."""
    weight = files.take(name, [(out, width)])
    return on_host(weight.astype(np.float32) if weight.dtype == np.float16 else weight)


def optional_bias(files: TensorFiles, name: str, out: int, required: bool) -> jax.Array | None:
    """The bias of the linear layer `name`, or None where it has none and needs none."""
    key = f"{name}.bias"
    if not required and key not in files:
        return None
    return on_host(finite(key, float32(files, key, (out,))))


class Format:
    """What every format's reader can do; names are the tensors' without their last part."""

    def __init__(self, files: TensorFiles):
        """Takes the open files."""
        self.files = files

    def linear(self, name: str, out: int, width: int, bias: bool) -> Linear:
        """The layer `name`, [out, width]; `bias` says whether there must be one."""
        raise NotImplementedError

    def embedding(self, name: str, vocab: int, width: int) -> jax.Array:
        """The embedding, [vocab, width] float."""
        return float_weight(self.files, f"{name}.weight", vocab, width)

    def vector(self, name: str, size: int) -> np.ndarray:
        """A norm's gain, [size] float32."""
        key = f"{name}.weight"
        return finite(key, float32(self.files, key, (size,)))

    def kv_parameters(self, attention: str, heads: int, head_dim: int) -> KvParameters | None:
        """The cache's parameters of the layer whose attention is `attention`, if it has them."""
        return None

    def check_all_used(self) -> None:
        """Raises CheckpointError for whatever in the folder nothing has asked for."""
        self.files.check_all_used()


class FloatFormat(Format):
    """A folder without quantisation; `quantize` makes int8 weights as they are read."""

    def __init__(self, files: TensorFiles, quantize: bool):
        """Takes the open files."""
        super().__init__(files)
        self.quantize = quantize

    def linear(self, name: str, out: int, width: int, bias: bool) -> Linear:
        """See `Format`."""
        weight = float_weight(self.files, f"{name}.weight", out, width)
        added = optional_bias(self.files, name, out, bias)
        if self.quantize and name != "lm_head":
            finite(f"{name}.weight", np.asarray(weight))  # codes would hide a NaN
            codes, scale = jax.jit(quantize_weight)(jax.device_put(weight))
            return DynamicInt8Linear(codes, scale, added)
        return FloatLinear(weight, added)


def permute(linear: Linear, head_dim: int, rotary_dim: int) -> Linear:
    """The layer with each head's columns in the order that partial rotary needs."""

    def reorder(leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 0:
            return leaf
        axis = 0  # of the weight's rows, and of everything that belongs to them
        return permute_for_rope(leaf, head_dim, rotary_dim=rotary_dim, axis=axis).arrays

    return jax.tree.map(reorder, linear)


def fuse(attention: str, q: Linear, k: Linear, v: Linear) -> tuple[Linear, ...]:
    """q, k and v as one layer where they are of one kind; else as they are.

    Raises:
      CheckpointError: they have the same input, and the files give different scales for it.
    """
    parts = (q, k, v)
    if len({type(part) for part in parts}) > 1:
        return parts
    _check_inputs_agree(attention, parts)
    biases = [part.bias for part in parts]
    bias = None
    if any(b is not None for b in biases):
        kinds = {b.dtype for b in biases if b is not None}
        if len(kinds) > 1:
            return parts
        (kind,) = kinds
        bias = _joined(
            np.zeros(part.weight.shape[0], kind) if part.bias is None else part.bias
            for part in parts
        )
    if len({part.weight.dtype for part in parts}) > 1:
        return parts
    weight = _joined(part.weight for part in parts)
    if isinstance(q, FloatLinear):
        return (FloatLinear(weight, bias),)
    scale = _joined(p.weight_scale for p in parts if not isinstance(p, FloatLinear))
    if isinstance(q, StaticInt8Linear):
        return (StaticInt8Linear(weight, q.input_scale, q.input_offset, scale, bias),)
    return (DynamicInt8Linear(weight, scale, bias),)


def _joined(arrays: Iterable[Any]) -> jax.Array:
    return on_host(np.concatenate([np.asarray(array) for array in arrays]))


def _check_inputs_agree(attention: str, parts: tuple[Linear, ...]) -> None:
    """Raises unless static layers that read one input quantise it alike."""
    for field in ("input_scale", "input_offset"):
        values = [float(getattr(p, field)) for p in parts if isinstance(p, StaticInt8Linear)]
        if len(set(values)) > 1:
            raise CheckpointError(
                f"`{attention}.q_proj`, `k_proj` and `v_proj` read one input and must have one "
                f"`{field}`, got {', '.join(map(str, values))}. Quantise them together."
            )


def stack_kv_parameters(parameters: Sequence[KvParameters | None]) -> KvParameters | None:
    """The layers' parameters as [L, Nkv, D] each; offsets only where one is not zero."""
    present = [p for p in parameters if p is not None]
    if not present:
        return None
    if len(present) < len(parameters):
        raise CheckpointError(
            f"every layer must have scales for the cache, and layer {parameters.index(None)} has "
            "none."
        )
    names = sorted(set.union(*map(set, present)))
    stacked = {name: np.stack([p[name] for p in present]) for name in names}
    if not any(stacked[name].any() for name in names if name.startswith("offset")):
        return {name: a for name, a in stacked.items() if name.startswith("scale")}
    return stacked
