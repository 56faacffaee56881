"""Reads compiled HLO: what is aliased, what is copied, how large the temporaries are."""

import math
import re

NATIVE_CALL = "@dequant_rope_quant_kvcache("  # in StableHLO

# Instructions that hand on a buffer or write into it, against those that make another one.
_COPIES = re.compile(r"= s8\[([\d,]+)\][^ ]* (copy|copy-start|transpose|broadcast|concatenate)\(")


def cache_copies(text, cache_elements):
    """HLO lines that make an int8 array at least as large as the cache."""
    lines = []
    for line in text.splitlines():
        match = _COPIES.search(line)
        if match and math.prod(int(d) for d in match[1].split(",")) >= cache_elements:
            lines.append(line.strip())
    return lines


def assert_in_place(compiled, cache_elements, caches=2):
    """The compiled function updates its donated caches of so many elements each in place."""
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= caches * cache_elements
    assert cache_copies(compiled.as_text(), cache_elements) == []


def native_calls(text):
    """How many calls of the operator's native target there are."""
    return text.count('custom_call_target="dequant_rope_quant_kvcache"')
