"""The README's Python blocks run, in order, as one program."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    exec(compile("\n".join(blocks), str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert "(4, 1, 8, 128) bfloat16 (4, 256, 2, 128)" in printed
    assert "(4, 1, 8, 128) 526,336 bytes" in printed
    assert "(2, 4, 1, 8, 128)" in printed
    assert "cpu: " in printed
