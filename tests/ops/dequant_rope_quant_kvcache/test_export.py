"""Exported, symbolic and ahead-of-time compiled calls, each run in a fresh process."""

import pickle

import jax
import numpy as np
import pytest
from jax.experimental import serialize_executable
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support import oracle, process
from support.results import assert_results

from jax_kvcache import dequant_rope_quant_kvcache

TARGET = jax.export.DisabledSafetyCheck.custom_call("dequant_rope_quant_kvcache")
Nq, Nkv, D = 2, 2, 64
H = (Nq + 2 * Nkv) * D
ASCEND = ("ascend", "ASCEND")  # JAX's spelling and the plugin's


def shapes(b, s, c1, c2, page):
    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    caches = (array((c1, c2, Nkv, D), np.int8),) * 2
    others = dict(
        x=array((b, s, H), np.int32),
        cos=array((b, s, 1, D), np.float16),
        sin=array((b, s, 1, D), np.float16),
        indices=array((b, s) if page else (b,), np.int32),
        scale_k=array((Nkv, D), np.float32),
        scale_v=array((Nkv, D), np.float32),
        weight_scale=array((H,), np.float32),
    )
    return caches, others


def values(b, s, c1, c2, page):
    rng = np.random.default_rng(b)
    caches, others = shapes(b, s, c1, c2, page)

    def value(name, a):
        if name == "indices":
            return rng.permutation(c1 * c2 + 2)[: a.size].reshape(a.shape).astype(np.int32) - 1
        if np.issubdtype(a.dtype, np.integer):
            return rng.integers(-128, 128, a.shape).astype(a.dtype)
        return (np.abs(rng.normal(size=a.shape)) + 0.01).astype(a.dtype)

    return (
        tuple(value("cache", c) for c in caches),
        {name: value(name, a) for name, a in others.items()},
    )


def step(page, implementation=None):
    def run(caches, others):
        return tuple(
            dequant_rope_quant_kvcache(
                **others,
                k_cache=caches[0],
                v_cache=caches[1],
                kv_output=True,
                cache_mode="page" if page else "contiguous",
                implementation=implementation,
            )
        )

    return jax.jit(run, donate_argnums=0)


def exported(function, arguments, platforms):
    return jax.export.export(function, platforms=platforms, disabled_checks=[TARGET])(*arguments)


EXPORTS = {  # name: (page, C1 follows B, implementation, platforms)
    "page_ffi": (True, False, "ffi", ("cpu",)),
    "page_xla": (True, False, "xla", ("cpu",)),
    "contiguous_ffi": (False, True, "ffi", ("cpu",)),
    "more_blocks_ffi": (False, False, "ffi", ("cpu",)),
    "cpu_and_ascend": (True, False, None, ("cpu", *ASCEND)),
}
SIZES = ((2, 3, 4, 5), (3, 1, 6, 7))  # B, S, C1, C2
SHARDED_SIZES = (4, 1, 4, 6)


def specs(call):
    """B over "dp"."""
    return jax.tree.map(lambda a: P("dp") if a.ndim and len(a) == SHARDED_SIZES[0] else P(), call)


def placed(mesh, call):
    def place(a, spec):
        where = jax.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)

    return jax.tree.map(place, call, specs(call))


def manual(mesh, call):
    whole = jax.shard_map(step(False), mesh=mesh, in_specs=specs(call), out_specs=P("dp"))
    return jax.jit(whole, donate_argnums=0), placed(mesh, call)


def explicit(mesh, call):
    return step(False), placed(mesh, call)


SHARDED = {"manual": (AxisType.Auto, manual), "explicit": (AxisType.Explicit, explicit)}


def run_in_fresh_process(folder):
    """Saves everything exported and compiled here, and runs it in one other process."""

    def save(name, suffix, content, calls):
        (folder / f"{name}.{suffix}").write_bytes(content)
        for i, call in enumerate(calls):
            (folder / f"{name}.{i}.arguments").write_bytes(pickle.dumps(call))

    for name, (page, per_batch, implementation, platforms) in EXPORTS.items():
        b, s, c1, c2 = jax.export.symbolic_shape("b, s, c1, c2")
        c1 = b if per_batch else c1
        artifact = exported(step(page, implementation), shapes(b, s, c1, c2, page), platforms)
        calls = [values(B, S, B if per_batch else C1, C2, page) for B, S, C1, C2 in SIZES]
        save(name, "export", artifact.serialize(), calls)

    for implementation in ("xla", "ffi"):
        call = values(*SIZES[0], page=True)
        compiled = step(True, implementation).lower(*call).compile()
        content = pickle.dumps(serialize_executable.serialize(compiled))
        save(f"compiled_{implementation}", "executable", content, [call])

    for name, (kind, over_devices) in SHARDED.items():
        call = values(*SHARDED_SIZES, page=False)
        artifact = exported(*over_devices(jax.make_mesh((2,), ("dp",), (kind,)), call), ("cpu",))
        save(name, "export", artifact.serialize(), [call])

    process.run(process.PROGRAMS / "run_artifacts.py", folder)


CALLS = [(name, i) for name in EXPORTS for i in range(2)]
CALLS += [(name, 0) for name in ("compiled_xla", "compiled_ffi", *SHARDED)]


def test_fresh_process(tmp_path):
    run_in_fresh_process(tmp_path)
    for name, i in CALLS:
        caches, others = pickle.loads((tmp_path / f"{name}.{i}.arguments").read_bytes())
        page = EXPORTS[name][0] if name in EXPORTS else name not in SHARDED
        want = oracle.dequant_rope_quant_kvcache(
            **others, k_cache=caches[0], v_cache=caches[1], kv_output=True,
            cache_mode="page" if page else "contiguous",
        )  # fmt: skip
        with np.load(tmp_path / f"{name}.{i}.npz") as z:
            assert_results(z.values(), want, f"{name}, call {i}")


@pytest.mark.parametrize("platforms", [ASCEND, ("cpu", *ASCEND)], ids=str)
def test_donation_is_exported(platforms):
    artifact = exported(step(True), shapes(2, 1, 4, 64, True), platforms)
    assert artifact.mlir_module().count("tf.aliasing_output") == 2
    assert "dequant_rope_quant_kvcache" in artifact.mlir_module()
