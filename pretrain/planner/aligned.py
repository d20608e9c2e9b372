"""How does a table look on a screen? Columns aligned, text to the left, numbers to the right."""

from collections.abc import Sequence


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows in columns, indented by two, no newline at the end.

    Args:
        rows: the first is the header; all of one length. A column is of numbers if its cell in the
            second row begins with a digit or a sign before one.
    """
    if len(rows) < 2:
        return "\n".join("  " + "  ".join(row) for row in rows)
    widths = [max(len(row[idx]) for row in rows) for idx in range(len(rows[0]))]
    return "\n".join(
        "  "
        + "  ".join(
            f"{cell:<{width}}" if idx == 0 or not _is_number(rows[1][idx]) else f"{cell:>{width}}"
            for idx, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or (cell[:1] in "-+" and cell[1:2].isdigit())
