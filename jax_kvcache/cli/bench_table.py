"""The benchmark's report as text: tables of times and of ratios."""

from jax_kvcache.ops.decode_attention.primitive import NAME as ATTENTION
from jax_kvcache.ops.dequant_rope_quant_kvcache.primitive import NAME as WRITE


def table(report: dict) -> str:
    """Two tables with a row per shape of the write, times and ratios, and two of attention."""
    shapes = report["shapes"]
    writes, reads = (
        {name: result for name, result in shapes.items() if result["operator"] == operator}
        for operator in (WRITE, ATTENTION)
    )
    unit, lines = f"microseconds per call, medians; {report['simd']}", []
    if writes:
        lines.append(f"{unit}; bytes moved, and the kernel's threads, GB/s and page faults")
        lines += _tables(writes, {"threads": "threads", "page_faults": "faults"})
    if reads:
        lines += [""] if writes else []
        lines.append(f"attention, {unit}; bytes of codes in use, and GB/s of them")
        lines += _tables(reads, {})
    return "\n".join(lines)


def _tables(shapes: dict[str, dict], extra: dict[str, str]) -> list[str]:
    times = {
        name: {
            "MB": f"{result['bytes'] / 1e6:.2f}",
            "GB/s": f"{result['gigabytes_per_second']:.1f}",
            **{title: f"{result[key]:.0f}" for key, title in extra.items()},
            **{k: f"{v:,.1f}" for k, v in result["microseconds"].items()},
        }
        for name, result in shapes.items()
    }
    ratios = {
        name: {k: f"{v:.2f}" for k, v in result["ratios"].items()}
        for name, result in shapes.items()
    }
    return [*_rows(times), "", "ratios, medians of those within a round", *_rows(ratios)]


def _rows(cells: dict[str, dict[str, str]]) -> list[str]:
    """Lines of a table: a header, then a row per key; "-" where a row has no such column."""
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    lines = [["", *columns]]
    lines += [[name, *(row.get(c, "-") for c in columns)] for name, row in cells.items()]
    first, *others = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([f"{name:{first}}", *(f"{t:>{w}}" for t, w in zip(texts, others, strict=True))])
        for name, *texts in lines
    ]
