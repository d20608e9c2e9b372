"""How does a report on a machine look to a person?"""

import textwrap
from collections.abc import Sequence

from pretrain.training.doctor import Found, Report

_GIB = 2**30
_WIDTH = 100


def as_text(report: Report) -> str:
    """Return a report as aligned tables: what is here, what is used, what is missing."""
    found = {name: piece for name, piece in report.pieces.items() if piece.is_there}
    absent = {name: piece for name, piece in report.pieces.items() if not piece.is_there}
    parts = [
        table(_machine(report)),
        "here\n" + table([(name, piece.detail) for name, piece in found.items()]),
        "packages\n" + table(_packages(report)),
        "used here for\n" + (table(list(report.used.items())) or f"  {report.why_unused}"),
        "emulated\n" + ("\n".join(f"  {line}" for line in report.emulated) or "  nothing"),
        "missing, and what that costs\n"
        + "\n".join(
            _wrapped(name, (piece.detail, f"for {piece.does}", _cost(piece)))
            for name, piece in absent.items()
        ),
        f"asked in {report.seconds:.1f} s, code {report.commit}",
    ]
    return "\n\n".join(parts)


def _cost(piece: Found) -> str:
    is_known = piece.source not in piece.cost
    return f"without it: {piece.cost}{f' ({piece.source})' if is_known else ''}"


def _machine(report: Report) -> list[tuple[str, ...]]:
    cpu = report.cpu
    rows = [
        ("processor", f"{cpu.model}, {cpu.cores} cores for this process"),
        ("instructions", ", ".join(cpu.features) or "none that we know"),
        ("torch's kernels", report.kernels or "torch did not say"),
        ("memory", f"{cpu.memory_bytes / _GIB:.1f} GiB"),
    ]
    rows += [
        (f"free in {name}", "no answer" if num_bytes is None else f"{num_bytes / _GIB:.1f} GiB")
        for name, num_bytes in report.free_bytes.items()
    ]
    rows += [
        (f"GPU {idx}", f"{gpu.name}, {gpu.memory_bytes / _GIB:.1f} GiB, driver {gpu.driver or '?'}")
        for idx, gpu in enumerate(report.gpus)
    ]
    return [*rows] if report.gpus else [*rows, ("GPU", "none")]


def _packages(report: Report) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("package", "here", "supported", "for", "")]
    rows += [
        (
            package.name,
            package.version or "-",
            package.supported,
            package.extra,
            "" if package.is_supported or not package.version else "NOT SUPPORTED",
        )
        for package in report.packages
    ]
    return rows


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows of equal length as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(f"  {line}".rstrip() for line in lines)


def _wrapped(name: str, texts: Sequence[str]) -> str:
    indent = " " * 22
    lines = [
        textwrap.fill(text, _WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ")
        for text in texts
    ]
    lines[0] = f"  {name:<20}{lines[0].lstrip()}"
    return "\n".join(lines)
