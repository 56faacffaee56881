"""A 70B-class model over 512 devices: what its cache update moves, in programs compiled for it."""

import json

from support import process

LAYOUTS = ("shard_map, interleaved columns", "automatic, plain columns", "explicit, plain columns")


def test_update():
    written = process.run(process.PROGRAMS / "simulate_70b.py", timeout=250)
    reports = [json.loads(line) for line in written.splitlines()]
    cases = [(report["layout"], report["implementation"]) for report in reports]
    assert cases == [(layout, name) for layout in LAYOUTS for name in ("ffi", "xla")]
    for report in reports:
        assert report["native call"] == (report["implementation"] == "ffi")
        # 16 sequences of 8192 rows, one kv head of 128 bytes for k and for v: 32 MiB a layer
        assert report["cache bytes per layer and device"] == 2 * 16 * 8192 * 128
        assert report["temporary bytes"] < 2**20
        # The plain column order gathers 16 tokens of 10240 int32, and the weights' scales.
        gathered = 0 if report["layout"] == LAYOUTS[0] else (16 + 1) * 10240 * 4
        assert report["collective bytes"] == gathered, report
        assert not any("s8[" in shape for shape, _ in report["collectives"]), report
