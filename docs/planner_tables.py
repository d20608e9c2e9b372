"""Which rows do the planner's tables have? JSON as its scripts wrote it, to Markdown."""

from collections.abc import Mapping
from typing import Any


def planner_memory_rows(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return measured and predicted peak memory of each configuration, the header first."""
    rows: list[tuple[str, ...]] = [
        ("row", "configuration", "n", "measured GiB", "predicted GiB", "error", "constant, MiB")
    ]
    rows += [
        (
            row["id"],
            f"`{row['case']}`",
            str(row["num_rows"]),
            f"{row['measured_gib']:.2f}",
            f"{row['predicted_gib']:.2f}",
            f"{row['error']:+.2%}",
            f"{row['fitted_mib']:.1f}",
        )
        for row in record["rows"]
    ]
    return rows
