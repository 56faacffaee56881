"""The operand tables in Python and the enumerations in the C++ headers say the same."""

import re
from pathlib import Path

import pytest
from support import internals

CORE = Path(__file__).parents[2] / "ffi" / "core"
OPERATORS = {
    "dequant_rope_quant_kvcache": (internals.Operands, internals.Results),
    "decode_attention": (internals.AttentionOperands, internals.AttentionResults),
}


def names_of(header, array):
    """The strings of an array of names."""
    body = re.search(rf"{array}\[\w+\] = \{{(.*?)\}};", header, re.DOTALL)[1]
    return re.findall(r'"([^"]+)"', body)


def comments_of(header, enumeration):
    """What each enumerator's comment says its dimensions are."""
    body = re.search(rf"enum {enumeration} : int \{{(.*?)\n\}};", header, re.DOTALL)[1]
    return re.findall(r"^\s*k\w+,\s*// (.*)$", body, re.MULTILINE)


def as_in_cpp(row):
    """A row's dimensions as the C++ comments write them."""
    dims = "[" + ", ".join(row.dims.split()) + "]"
    flat = " flat" if row.flat else ""
    may_lack = getattr(row, "optional", False) or getattr(row, "option", None)
    return dims + flat + (" or [0]" if may_lack else "")


@pytest.mark.parametrize("operator", OPERATORS)
def test_names_order_and_dimensions(operator):
    header = (CORE / f"{operator}.h").read_text()
    for fields, array, enumeration in zip(
        OPERATORS[operator], ("kArgNames", "kRetNames"), ("Arg", "Ret"), strict=True
    ):
        rows = internals.operands.table(fields)
        written = [name.removesuffix(" result") for name in names_of(header, array)]
        assert written == list(rows)
        comments = comments_of(header, enumeration)
        assert len(comments) == len(rows)
        for (name, row), comment in zip(rows.items(), comments, strict=True):
            assert comment.startswith(as_in_cpp(row)), f"{name}: {comment}"
