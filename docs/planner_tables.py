"""Which rows have the planner's tables of figures? JSON as its fit wrote it, to Markdown."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from figure_tables import markdown_table  # beside this file, which figures.py imports


def planner_time_table(record: Mapping[str, Any]) -> str:
    """Return the errors of predicted step times: by source, by GPU, by constant and by row."""
    return "\n".join(
        (
            _by_source(record),
            _by_gpu(record["gpus"]),
            _by_row([row for row in record["rows"] if row["gpu"].startswith("H")]),
        )
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _by_source(record: Mapping[str, Any]) -> str:
    rows = [("source, Hopper GPUs", "release", "n", "median", "90th percentile", "worst")]
    for release in ("newest", "oldest"):
        parts = [*record["by_source"][release], {"source": "all", **record["hopper"][release]}]
        rows += [
            (
                part["source"],
                release,
                str(part["n"]),
                _percent(part["median"]),
                _percent(part["p90"]),
                _percent(part["worst"]),
            )
            for part in parts
        ]
    return markdown_table(rows)


def _by_gpu(gpus: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [("GPU", "n", "median", "90th percentile", "worst", "step measured over predicted")]
    rows += [
        (
            name,
            str(part["n"]),
            *(_percent(part[key]) for key in ("median", "p90", "worst")),
            f"{part['step_error']['low']:+.1%} to {part['step_error']['high']:+.1%}",
        )
        for name, part in gpus.items()
    ]
    return markdown_table(rows)


def _by_row(found: Sequence[Mapping[str, Any]]) -> str:
    rows = [("row", "model", "GPU", "precision", "layout", "tokens", "measured", "predicted", "")]
    rows += [
        (
            row["id"],
            row["model"],
            row["gpu"].split("-")[0] + (" 500 W" if "500W" in row["gpu"] else ""),
            row["precision"],
            _short(row["layout"]),
            f"{row['sequence_tokens']:,}",
            f"{row['measured']:,.0f}",
            f"{row['predicted']:,.0f}",
            f"{100 * row['error']:+.0f} %",
        )
        for row in sorted(found, key=lambda row: abs(row["error"]))
    ]
    return markdown_table(rows)


def _short(layout: str) -> str:
    axes, _, ranks = layout.partition(" (")
    kept = [axis for axis in axes.split() if axis.lstrip("abcdefghijklmnopqrstuvwxyz") != "1"]
    return " ".join([ranks.removesuffix(" ranks)"), *kept])


def planner_memory_table(record: Mapping[str, Any]) -> str:
    """Return measured and predicted peak memory of each configuration."""
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
    return markdown_table(rows)


PLANNER_TABLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "planner_time": planner_time_table,
    "planner_memory": planner_memory_table,
}
