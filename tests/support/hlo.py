"""Reads compiled HLO: what is aliased, what is copied, what devices send each other."""

import math
import re

NATIVE_CALL = "@dequant_rope_quant_kvcache("  # in StableHLO

# Instructions that hand on a buffer or write into it, against those that make another one.
_COPIES = re.compile(r"= s8\[([\d,]+)\][^ ]* (copy|copy-start|transpose|broadcast|concatenate)\(")
_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|"
    r"collective-broadcast|ragged-all-to-all)(?:-start)?\("
)
_ARRAY = re.compile(r"([a-z]+)(\d+)\[([\d,]*)\]")


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


def collectives(text):
    """(shape, kind) of every collective."""
    return _COLLECTIVE.findall(text)


def collective_bytes(text):
    """Bytes that a device holds as the results of the program's collectives."""
    return sum(
        int(bits) // 8 * math.prod(int(d) for d in dims.split(",") if d)
        for shape, _ in collectives(text)
        for _, bits, dims in _ARRAY.findall(shape)
    )


def fusions(text):
    """The names of each fused computation's instructions, without their numbers."""
    found, inside = {}, None
    for line in text.splitlines():
        if line.startswith("%") and line.endswith("{"):
            inside = line[1:].split(" ", 1)[0] if "fused" in line.split("(", 1)[0] else None
            if inside:
                found[inside] = set()
        elif line.startswith("}"):
            inside = None
        elif inside and (match := re.match(r"\s+(?:ROOT )?%?([\w-]+?)(?:\.[\d.]+)? = ", line)):
            found[inside].add(match[1])
    return found
