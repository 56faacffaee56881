"""Without a usable native library everything still works, once warned and with the reason."""

import pytest
from support import process

REASONS = {
    "missing": "the native library cannot be loaded",
    "stale": "is of another version: it has no 'decode_attention_cpu'",
    "newer": "the native library was built for XLA FFI 0.3 and the installed jaxlib has 0.1",
}


@pytest.mark.parametrize("how", REASONS)
def test_broken_library(how):
    written = process.run(process.PROGRAMS / "broken_library.py", how)
    lines = dict(line.split(": ", 1) for line in written.splitlines() if ": " in line)
    reason = REASONS[how]
    assert lines["zeros"] == "[0.]"
    assert lines["ran"] == "(2, 1, 2, 16)"
    assert lines["warnings"].startswith("1 dequant_rope_quant_kvcache runs its XLA implementation")
    assert reason in lines["warnings"]
    assert reason in lines["refused"]
    assert lines["explained"].startswith("cpu: xla: ")
    assert reason in lines["explained"]
    assert reason in lines["  ffi, cpu     not available"]
