"""What does the planner say of each row of a table of measurements?

Rows have the columns of measured_runs.csv; what was measured need not be filled in and is not read.
A row that cannot be predicted gets the reason.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.planner.hardware import hardware_of
from pretrain.planner.published import read_rows, workload_of
from pretrain.planner.step_time import predict_step
from pretrain.training.forecasts import stage_memory

ADDED = (
    "predicted_step_time_s",
    "predicted_tokens_per_s_per_gpu",
    "predicted_peak_gib",
    "not_predicted",
    "outside_fitted_range",
)
"""Columns that are added; `not_predicted` says why a prediction is missing."""
_GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPredictions:
    """A table with the planner's columns."""

    names: tuple[str, ...]
    """Columns, those of the given table first."""
    rows: tuple[Mapping[str, str], ...]
    """As given, `ADDED` filled."""

    @property
    def num_predicted(self) -> int:
        """Rows whose step time was predicted."""
        return sum(bool(row[ADDED[0]]) for row in self.rows)

    def write(self, path: Path) -> None:
        """Write the table as CSV.

        Raises:
            OSError: if it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.names)
            writer.writeheader()
            writer.writerows(self.rows)


def predict_rows(path: Path) -> RowPredictions:
    """Return a table of measurements with what the planner predicts for each row.

    Raises:
        ValueError: if the file cannot be read, lacks columns, or has no rows.
    """
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"rows={path}: no rows given, at least one is needed")
    predicted = tuple({**row, **_prediction(row)} for row in rows)
    return RowPredictions(names=tuple(predicted[0]), rows=predicted)


def _prediction(row: Mapping[str, str]) -> dict[str, str]:
    columns = dict.fromkeys(ADDED, "")
    try:
        workload = workload_of(row)
        step = predict_step(workload, hardware_of(row["gpu"]))
    except ValueError as error:
        return columns | {"not_predicted": str(error)}
    columns |= {
        "predicted_step_time_s": f"{step.total_s:.4g}",
        "predicted_tokens_per_s_per_gpu": f"{step.tokens_per_s:.5g}",
        "outside_fitted_range": "; ".join(step.outside),
    }
    try:
        memory = stage_memory(workload)
    except ValueError as error:
        return columns | {"not_predicted": f"memory: {error}"}
    if not memory:
        return columns | {"not_predicted": "memory: no prediction for this step"}
    peak = max(sum(stage.values()) for stage in memory)
    return columns | {"predicted_peak_gib": f"{peak / _GIB:.4g}"}


def as_text(predictions: RowPredictions, reasons: int = 8) -> str:
    """Return how many rows were predicted, and the most frequent reasons for the others."""
    counts: dict[str, int] = {}
    for row in predictions.rows:
        if not row[ADDED[0]]:
            counts[row["not_predicted"]] = counts.get(row["not_predicted"], 0) + 1
    lines = [f"{predictions.num_predicted} of {len(predictions.rows)} rows predicted"]
    most: Sequence[str] = sorted(counts, key=lambda reason: -counts[reason])
    lines += [f"  {counts[reason]:>4}  {reason}" for reason in most[:reasons]]
    return "\n".join(lines)
