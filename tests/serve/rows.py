"""What was checked, what was reached, and what was required?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "DIFFERS", "info"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table."""

    what: str
    reached: str
    required: str
    verdict: Verdict


def checked(what: str, *, reached: object, required: object, holds: bool) -> Row:
    """Return the row of a requirement."""
    verdict: Verdict = "ok" if holds else "DIFFERS"
    return Row(what=what, reached=str(reached), required=str(required), verdict=verdict)


def equal(what: str, *, reached: object, required: object) -> Row:
    """Return the row of two things that must be equal; if not, both are shown whole."""
    if reached == required:
        return Row(what=what, reached=brief(reached), required="equal", verdict="ok")
    return Row(what=what, reached=ascii(reached), required=ascii(required), verdict="DIFFERS")


def info(what: str, reached: object) -> Row:
    """Return a row that nothing depends on."""
    return Row(what=what, reached=str(reached), required="", verdict="info")


def brief(value: object, *, size: int = 44) -> str:
    """Return a value on one line of ASCII, cut to `size` characters."""
    text = ascii(value)
    return text if len(text) <= size else f"{text[: size - 4]} ..."


def format_rows(rows: Sequence[Row]) -> str:
    """Return the table for people."""
    cells = [("check", "reached", "required", "verdict")]
    cells += [(row.what, row.reached, row.required, row.verdict) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
